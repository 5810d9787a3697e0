"""Puts a worker together and runs it until it is told to stop or its engine dies."""

import asyncio
import contextlib
import os
from collections.abc import Callable

import grpc.aio

from ascendra.v1 import worker_pb2, worker_pb2_grpc
from services.common.access import named_peers
from services.common.grpc_server import GrpcServer, start_grpc_server
from services.common.http_status import HttpStatus, start_http_status
from services.common.lifecycle import announce_ready
from services.common.logging import get_logger
from services.common.tracing import make_tracer
from services.worker.config import WorkerConfig
from services.worker.engine.contract import Engine
from services.worker.registration import keep_registered
from services.worker.servicer import WorkerServicer
from services.worker.step_log import StepLog
from services.worker.telemetry import TelemetryReporter
from services.worker.worker import Worker

log = get_logger()

EXIT_ENGINE_DIED = 70
_ENGINE_CHECK_S = 0.1
_LAST_WORDS_S = 0.5
"""Time for the routers to read how their requests ended."""
Announce = Callable[[str, str, str], None]
"""(worker id, address, HTTP address): the worker takes requests."""


async def run_worker(config: WorkerConfig, stop: asyncio.Event, announce: Announce | None = None) -> int:
    """Run a worker; returns the exit status of the process: 0 after a drain, 70 when the engine died."""
    # Before any gRPC object: the engine core is forked, and gRPC's threads would not survive that.
    from services.worker.engine.adapter import VllmEngine

    engine = await VllmEngine.start(config.engine_settings())
    tracer = make_tracer("worker", config.effective_worker_id, config.otlp_endpoint, sample_ratio=1.0)
    worker = Worker(config, engine, tracer)
    steps = StepLog(config.step_log)
    if config.step_log:
        engine.on_report(steps.note)
    server = await start_grpc_server(
        config.listen,
        lambda server: _register(server, worker),
        tls=config.tls,
        authorize=named_peers(config.tls),
    )
    http = await start_http_status(config.metrics_listen, lambda: worker.ready) if config.metrics_listen else None
    address = config.advertise or server.address
    (announce or _announce)(worker.worker_id, server.address, http.address if http else "")
    background = [asyncio.create_task(_watch_engine(worker, engine), name="watch-engine")]
    if config.predictor:
        reporter = TelemetryReporter(worker, config.predictor, config.tls.as_client())
        background.append(asyncio.create_task(reporter.run(), name="telemetry"))
    background += [
        asyncio.create_task(
            keep_registered(
                router,
                address=address,
                worker_id=worker.worker_id,
                ttl_ms=config.register_ttl_ms,
                tls=config.tls.as_client(),
                api_key_file=config.api_key_file,
            ),
            name=f"register-{router}",
        )
        for router in config.routers
    ]
    try:
        return await _serve(worker, server, stop)
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await asyncio.to_thread(steps.close)
        await _close(worker, server, http, engine)


def _register(server: grpc.aio.Server, worker: Worker) -> list[str]:
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(worker), server)
    return [worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name]


def _announce(worker_id: str, address: str, http_address: str) -> None:
    announce_ready("worker", worker_id=worker_id, address=address, http=http_address)


async def _serve(worker: Worker, server: GrpcServer, stop: asyncio.Event) -> int:
    """Return when the engine died, or when a drain that `stop` asked for is over."""
    died = asyncio.create_task(worker.engine_died.wait())
    stopped = asyncio.create_task(stop.wait())
    drain_begun = asyncio.create_task(worker.drain_begun.wait())
    try:
        await asyncio.wait([died, stopped, drain_begun], return_when=asyncio.FIRST_COMPLETED)
        await server.set_serving(False)
        await asyncio.wait([died, stopped], return_when=asyncio.FIRST_COMPLETED)
        if died.done():
            return await _give_up(worker)
        worker.begin_drain(worker.config.drain_timeout_s)
        drained = asyncio.create_task(worker.drained())
        try:
            await asyncio.wait([died, drained], return_when=asyncio.FIRST_COMPLETED)
        finally:
            drained.cancel()
        return await _give_up(worker) if died.done() else 0
    finally:
        for task in (died, stopped, drain_begun):
            task.cancel()


async def _give_up(worker: Worker) -> int:
    """Let every request hear that the engine is gone."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LAST_WORDS_S):
            await worker.idle()
            await asyncio.sleep(_LAST_WORDS_S / 5)
    return EXIT_ENGINE_DIED


async def _watch_engine(worker: Worker, engine: Engine) -> None:
    while engine.is_alive():  # noqa: ASYNC110 - vLLM offers a flag, not an event
        await asyncio.sleep(_ENGINE_CHECK_S)
    worker.report_engine_death()


async def _close(worker: Worker, server: GrpcServer, http: HttpStatus | None, engine: Engine) -> None:
    for outbox in worker.outboxes:
        outbox.close()
    await server.stop(_LAST_WORDS_S)
    if http is not None:
        await http.stop()
    if worker.tracer is not None:
        await worker.tracer.close()
    if worker.engine_died.is_set():
        # What is left of a dead engine may hang in its own clean-up; the kernel does it for us.
        log.error("exiting", status=EXIT_ENGINE_DIED)
        engine.abandon()
        os._exit(EXIT_ENGINE_DIED)
    await engine.close()
