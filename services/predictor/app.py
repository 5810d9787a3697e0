"""Puts the predictor together and runs it until it is told to stop."""

import asyncio
import contextlib

import grpc.aio

from ascendra.v1 import predictor_pb2, predictor_pb2_grpc
from services.common.access import named_peers
from services.common.grpc_server import start_grpc_server
from services.common.http_status import start_http_status
from services.common.lifecycle import announce_ready
from services.predictor.config import PredictorConfig
from services.predictor.models import ModelStore
from services.predictor.servicer import PredictorServicer

_GRACE_S = 1.0
"""Time for streams to end by themselves; workers and routers reconnect to another predictor or fall back."""


async def run_predictor(config: PredictorConfig, stop: asyncio.Event) -> int:
    """Run the predictor until `stop` is set; returns the exit status."""
    store = ModelStore(
        max_workers=config.max_workers, forget_after_s=config.forget_after_s, warm_start=config.warm_start()
    )
    servicer = PredictorServicer(store)

    def register(server: grpc.aio.Server) -> list[str]:
        predictor_pb2_grpc.add_PredictorServiceServicer_to_server(servicer, server)
        return [predictor_pb2.DESCRIPTOR.services_by_name["PredictorService"].full_name]

    server = await start_grpc_server(config.listen, register, tls=config.tls, authorize=named_peers(config.tls))
    http = await start_http_status(config.metrics_listen, lambda: not stop.is_set()) if config.metrics_listen else None
    publishing = asyncio.create_task(servicer.publish(config.publish_interval_s), name="publish-models")
    stopped = asyncio.create_task(stop.wait(), name="wait-for-stop")
    announce_ready("predictor", address=server.address, http=http.address if http else "")
    try:
        await asyncio.wait([publishing, stopped], return_when=asyncio.FIRST_COMPLETED)
        if publishing.done():
            publishing.result()  # it never ends by itself
        return 0
    finally:
        servicer.close()
        for task in (publishing, stopped):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await server.set_serving(False)
        await server.stop(_GRACE_S)
        if http:
            await http.stop()
