"""Announces the worker to the routers it is configured with, again and again."""

import asyncio

import grpc
import grpc.aio

from ascendra.v1 import cluster_pb2, cluster_pb2_grpc
from services.common.channels import open_channel
from services.common.logging import get_logger

log = get_logger()

_CALL_TIMEOUT_S = 2.0


async def keep_registered(router: str, *, address: str, worker_id: str, ttl_ms: int) -> None:
    """Register with a router every third of the ttl until cancelled."""
    channel = open_channel(router)
    stub = cluster_pb2_grpc.ClusterServiceStub(channel)
    announcement = cluster_pb2.RegisterWorkerRequest(address=address, worker_id=worker_id, ttl_ms=ttl_ms)
    registered: bool | None = None
    try:
        while True:
            try:
                await stub.RegisterWorker(announcement, timeout=_CALL_TIMEOUT_S)
                known = True
            except grpc.aio.AioRpcError as error:
                known = False
                if registered is not False:
                    log.info("router_away", router=router, status=error.code().name)
            if known and not registered:
                log.info("registered", router=router, address=address)
            registered = known
            await asyncio.sleep(ttl_ms / 3000)
    finally:
        await channel.close(None)
