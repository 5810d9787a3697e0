"""`ClusterService`: status, roles, drains, registrations, explanations."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from ascendra import __version__
from ascendra.v1 import cluster_pb2, cluster_pb2_grpc, common_pb2, worker_pb2
from services.common.access import current_caller
from services.common.errors import InvalidArgument, NotFound, Unavailable
from services.common.wire import ROLE_FROM_PROTO, ROLE_TO_PROTO
from services.policy.state import QueuedRequest, Slo
from services.router.attainment import WINDOW_S
from services.router.discovery import WorkerPool
from services.router.dispatcher import Dispatcher
from services.router.estimates import kept_ahead
from services.router.worker_link import WorkerLink

_TYPICAL_PROMPT_TOKENS = 512
_ROLE_TIMEOUT_S = 5.0
_MIN_TTL_MS, _MAX_TTL_MS = 100, 3_600_000


class ClusterServicer(cluster_pb2_grpc.ClusterServiceServicer):
    """Serves operators and workers that announce themselves."""

    def __init__(self, router_id: str, pool: WorkerPool, dispatcher: Dispatcher, closing: asyncio.Event) -> None:
        """Prepare.

        Args:
            closing: set when endless streams should end.
        """
        self._router_id = router_id
        self._pool = pool
        self._dispatcher = dispatcher
        self._closing = closing
        self._began_s = time.monotonic()

    async def GetStatus(self, request: cluster_pb2.GetStatusRequest, context: Any) -> cluster_pb2.GetStatusResponse:
        """Return the cluster as this router sees it."""
        return self.status()

    async def WatchStatus(
        self, request: cluster_pb2.WatchStatusRequest, context: Any
    ) -> AsyncIterator[cluster_pb2.WatchStatusResponse]:
        """Return it again and again."""
        if 0 < request.interval_ms < 100:
            raise InvalidArgument(f"interval_ms must be at least 100, or 0 for 1000; got {request.interval_ms}")
        interval_s = (request.interval_ms or 1000) / 1000
        while not self._closing.is_set():
            yield cluster_pb2.WatchStatusResponse(status=self.status())
            try:
                async with asyncio.timeout(interval_s):
                    await self._closing.wait()
            except TimeoutError:
                pass

    async def RegisterWorker(
        self, request: cluster_pb2.RegisterWorkerRequest, context: Any
    ) -> cluster_pb2.RegisterWorkerResponse:
        """Know a worker for a while."""
        if not request.address or len(request.address) > 256:
            raise InvalidArgument("address must be 1 to 256 characters, host:port or unix:PATH")
        if not _MIN_TTL_MS <= request.ttl_ms <= _MAX_TTL_MS:
            raise InvalidArgument(f"ttl_ms must be within {_MIN_TTL_MS} and {_MAX_TTL_MS}, got {request.ttl_ms}")
        try:
            self._pool.register(request.address, request.ttl_ms / 1000)
        except ValueError as error:
            raise Unavailable(str(error), retry_safe=True) from error
        return cluster_pb2.RegisterWorkerResponse(router_id=self._router_id)

    async def SetRole(self, request: cluster_pb2.SetRoleRequest, context: Any) -> cluster_pb2.SetRoleResponse:
        """Change a worker's role and answer when it is in force."""
        if request.role not in ROLE_FROM_PROTO:
            raise InvalidArgument(f"role must be low priority, high priority or unified, got {request.role}")
        link = self._link(request.worker_id)
        role = ROLE_FROM_PROTO[request.role]
        link.send_control(worker_pb2.AttachRequest(set_role=worker_pb2.SetRole(role=request.role)))
        try:
            async with asyncio.timeout(_ROLE_TIMEOUT_S):
                await link.role_is(role)
        except TimeoutError:
            raise Unavailable(
                f"worker {request.worker_id!r} did not change its role within {_ROLE_TIMEOUT_S:g} s", retry_safe=True
            ) from None
        return cluster_pb2.SetRoleResponse(role=ROLE_TO_PROTO[link.instance.view.role])

    async def DrainWorker(
        self, request: cluster_pb2.DrainWorkerRequest, context: Any
    ) -> cluster_pb2.DrainWorkerResponse:
        """Begin a drain: waiting requests leave the worker, and running ones if their KV cache can go with them.

        The others end there, or move when the worker gives them up.
        """
        link = self._link(request.worker_id)
        link.instance.view.draining = True
        drain = worker_pb2.BeginDrain(timeout_ms=request.timeout_ms)
        link.send_control(worker_pb2.AttachRequest(begin_drain=drain))
        return cluster_pb2.DrainWorkerResponse(remaining=len(link.placed))

    async def Explain(self, request: cluster_pb2.ExplainRequest, context: Any) -> cluster_pb2.ExplainResponse:
        """Return the decisions about a request, live or recent."""
        found = self._dispatcher.explain(request.request_id)
        if found is None or not current_caller().may_see(found[0], request.tenant):  # whether it exists is not told
            raise NotFound(f"request_id {request.request_id[:128]!r} is not known here", reason="UNKNOWN_REQUEST")
        return found[1]

    def status(self) -> cluster_pb2.GetStatusResponse:
        """Return the cluster as this router sees it."""
        now_s = time.monotonic()
        dispatcher, links = self._dispatcher, self._pool.links()
        workers = sorted((self._worker(link, now_s) for link in links), key=lambda w: (w.worker_id, w.address))
        predictions = dispatcher.predictions
        return cluster_pb2.GetStatusResponse(
            router_id=self._router_id,
            version=__version__,
            workers=workers,
            attainment=dispatcher.history.attainment.status(now_s),
            window_s=WINDOW_S,
            live_requests=len(dispatcher.live),
            prediction_policy=predictions.policy([link.worker_id for link in links if link.attached], now_s),
            predictor_connected=predictions.connected,
            counters=_counters(dispatcher),
            uptime_s=now_s - self._began_s,
            held_requests=len(dispatcher.binder) if dispatcher.binder is not None else 0,
        )

    def _worker(self, link: WorkerLink, now_s: float) -> cluster_pb2.WorkerStatus:
        instance, known = link.instance, link.known
        view = self._dispatcher.placer.view(link, now_s)
        typical = QueuedRequest(
            request_id="typical",
            arrival_s=now_s,
            prompt_tokens=_TYPICAL_PROMPT_TOKENS,
            slo=Slo(ttft_s=1.0, tbt_s=1.0),
        )
        estimate = kept_ahead(view, instance.budget).estimate(typical)
        policy = instance.policy
        names = (policy.value_function, policy.token_budget, policy.relegation)
        return cluster_pb2.WorkerStatus(
            worker_id=link.worker_id,
            address=link.address,
            health=link.health(),
            role=ROLE_TO_PROTO[view.role] if link.worker_id else common_pb2.ROLE_UNSPECIFIED,
            model=known.model,
            engine=known.engine,
            waiting=max(instance.waiting, 0),
            running=instance.running,
            queued_prefill_tokens=instance.queued_prefill_tokens,
            kv_usage=instance.kv_usage,
            predicted_ttft_s=estimate.mean_s if link.attached else 0.0,
            age_s=now_s - instance.last_message_s if instance.last_message_s else 0.0,
            round_trip_s=instance.round_trip_s,
            tokens_per_s=instance.rate(now_s),
            model_source=view.model.source,
            policy=link.refused_why or " ".join(name for name in names if name),
            delivery_s=instance.delivery_s,
        )

    def _link(self, worker_id: str) -> WorkerLink:
        link = self._pool.find(worker_id)
        if link is None or not link.attached:
            raise NotFound(f"worker_id {worker_id[:128]!r} is not attached", reason="UNKNOWN_WORKER")
        return link


def _counters(dispatcher: Dispatcher) -> dict[str, int]:
    """Return the counters under the names of the proto's comment."""
    plural = {
        "offload": "offloads",
        "relief": "reliefs",
        "ticket": "tickets",
        "relegate": "relegations",
        "refuse": "refusals",
        "move": "moves",
        "place": "placements",
    }
    named = {plural[kind]: 0 for kind in plural}
    for kind, count in dispatcher.history.counters.items():
        named[plural.get(kind, kind)] = count
    return named
