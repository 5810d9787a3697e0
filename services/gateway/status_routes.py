"""/health, /live, /version, /metrics, and the console."""

from pathlib import Path

from prometheus_client import REGISTRY, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from ascendra import __version__
from services.common.access import Right
from services.gateway import metrics
from services.gateway.callers import caller_of
from services.gateway.cluster_view import Snapshot, as_plain
from services.gateway.gateway import Gateway
from services.gateway.model_routes import as_json
from services.gateway.openapi import openapi

CONSOLE = Path(__file__).with_name("console.html")


def status_routes(gateway: Gateway) -> list[Route]:
    """Return the routes."""
    document = openapi(gateway.config)

    async def health(_: Request) -> Response:
        if gateway.draining:
            return PlainTextResponse("draining\n", status_code=503)
        snapshot = await gateway.view.snapshot()
        if not snapshot.reachable:
            return PlainTextResponse("no router answers\n", status_code=503)
        return PlainTextResponse("ok\n") if snapshot.ready else PlainTextResponse("no worker is ready\n", 503)

    async def live(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def show_version(_: Request) -> Response:
        return as_json({"version": __version__})

    async def show_openapi(_: Request) -> Response:
        return as_json(document)

    async def show_metrics(request: Request) -> Response:
        caller_of(gateway.access, request.headers, Right.MONITOR)
        _set_cluster_metrics(await gateway.view.snapshot())
        return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)

    async def console(_: Request) -> Response:
        policy = "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
        policy += "; frame-ancestors 'none'"
        return FileResponse(CONSOLE, media_type="text/html", headers={"content-security-policy": policy})

    async def console_status(request: Request) -> Response:
        caller_of(gateway.access, request.headers, Right.MONITOR)
        snapshot = await gateway.view.snapshot()
        return as_json(
            {
                "attainment_target": gateway.config.attainment_target,
                "gateway": {"version": __version__, "in_flight": gateway.in_flight, **metrics.totals()},
                **snapshot.as_json(),
                "recent": gateway.recent.as_json(""),
            }
        )

    async def console_explain(request: Request) -> Response:
        caller = caller_of(gateway.access, request.headers)
        tenant = "" if caller.may(Right.ADMIN) else caller.name
        explanation = await gateway.routers.any.explain(request.path_params["request_id"], tenant=tenant)
        return as_json(as_plain(explanation))

    return [
        *(Route(path, health) for path in ("/health", "/healthz", "/readyz")),
        *(Route(path, live) for path in ("/live", "/livez")),
        Route("/version", show_version),
        Route("/openapi.json", show_openapi),
        Route("/metrics", show_metrics),
        Route("/", console),
        Route("/console/status", console_status),
        Route("/console/explain/{request_id}", console_explain),
    ]


def _set_cluster_metrics(snapshot: Snapshot) -> None:
    metrics.RUNNING.clear()
    metrics.WAITING.clear()
    for model, (running, waiting) in snapshot.load_by_model().items():
        metrics.RUNNING.labels(model).set(running)
        metrics.WAITING.labels(model).set(waiting)
    for router in snapshot.routers:
        metrics.ROUTER_UP.labels(router.address).set(router.status is not None)
