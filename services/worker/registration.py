"""Announces the worker to the routers it is configured with, again and again."""

import asyncio

import grpc
import grpc.aio

from ascendra.errors import InvalidArgumentError
from ascendra.tls import Tls
from ascendra.v1 import cluster_pb2, cluster_pb2_grpc
from services.common.access import read_key
from services.common.channels import Connector
from services.common.config import ConfigError
from services.common.logging import get_logger

log = get_logger()

_CALL_TIMEOUT_S = 2.0


async def keep_registered(
    router: str, *, address: str, worker_id: str, ttl_ms: int, tls: Tls | None = None, api_key_file: str = ""
) -> None:
    """Register with a router every third of the ttl until cancelled."""
    connector = Connector(router, tls)
    announcement = cluster_pb2.RegisterWorkerRequest(address=address, worker_id=worker_id, ttl_ms=ttl_ms)
    registered: bool | None = None
    try:
        while True:
            try:
                stub = cluster_pb2_grpc.ClusterServiceStub(await connector.channel())
                key = read_key(api_key_file)
                metadata = (("authorization", f"Bearer {key}"),) if key else ()
                await stub.RegisterWorker(announcement, timeout=_CALL_TIMEOUT_S, metadata=metadata)
                known = True
            except (grpc.aio.AioRpcError, InvalidArgumentError, ConfigError) as error:
                known = False
                if registered is not False:
                    why = error.code().name if isinstance(error, grpc.aio.AioRpcError) else str(error)
                    log.info("router_away", router=router, status=why)
            if known and not registered:
                log.info("registered", router=router, address=address)
            registered = known
            await asyncio.sleep(ttl_ms / 3000)
    finally:
        await connector.close()
