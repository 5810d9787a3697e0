"""Every hop of a cluster under mutual TLS, from HTTPS to the sink."""

import asyncio
import ssl
from collections.abc import Sequence
from pathlib import Path

import grpc
import httpx

from ascendra import AsyncClient, SamplingParams, SinkEnd, TokenSink, serve_sink
from services.common.access import Access
from services.common.tls import TlsConfig, https_context
from services.gateway.app import build_app
from services.gateway.config import GatewayConfig
from services.gateway.gateway import Gateway
from services.gateway.http_server import start_http_server
from services.predictor.app import run_predictor
from services.predictor.config import PredictorConfig
from services.router.config import SinkConfig
from services.worker.registration import keep_registered
from tests.support.certificates import Certificates
from tests.support.local_router import local_router, until
from tests.support.scripted_worker import ScriptedWorker


class Collecting(TokenSink):
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.ended = asyncio.Event()

    async def on_tokens(self, request_id: str, offset: int, token_ids: Sequence[int], text: str) -> None:
        """Keep tokens."""
        self.token_ids += token_ids

    async def on_finished(self, request_id: str, text: str, end: SinkEnd) -> None:
        """Note the end."""
        self.ended.set()


def sink_credentials(certificates: Certificates) -> grpc.ServerCredentials:
    """Return what a sink's owner would make."""
    key, chain, ca = (Path(certificates.file(name)).read_bytes() for name in ("sink.key", "sink.crt", "ca.crt"))
    return grpc.ssl_server_credentials([(key, chain)], ca, require_client_auth=True)


async def plaintext_answer(address: str) -> bytes:
    """Return what somebody who speaks plain HTTP to a port gets."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
    try:
        async with asyncio.timeout(20):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_a_request_crosses_only_encrypted_hops(
    certificates: Certificates, callers: Path, tokenizer_directory: Path, unused_tcp_port: int
) -> None:
    """HTTPS, gateway to router, worker to router and back, router to predictor and to sink."""
    stop = asyncio.Event()
    predictor = f"127.0.0.1:{unused_tcp_port}"
    names = ("router", "worker")
    block = TlsConfig(**certificates.block("predictor", client_names=names))
    predicting = asyncio.create_task(
        run_predictor(PredictorConfig(listen=predictor, metrics_listen="", tls=block), stop)
    )
    worker = ScriptedWorker()
    await worker.start(tls=TlsConfig(**certificates.block("worker", client_names=("router",))))
    sink = Collecting()
    async with (
        serve_sink(sink, "127.0.0.1:0", sink_credentials(certificates)) as sink_address,
        local_router(
            tokenizer_directory,
            [],
            client=certificates.client("client"),
            tls=TlsConfig(**certificates.block("router")),
            api_keys_file=str(callers),
            predictor=predictor,
            sinks={"copy": SinkConfig(address=sink_address)},
        ) as router,
    ):
        registering = asyncio.create_task(
            keep_registered(
                router.router.address,
                address=worker.address,
                worker_id="w1",
                ttl_ms=3000,
                tls=certificates.client("worker"),
            )
        )
        config = GatewayConfig(
            routers=(router.router.address,),
            tls=TlsConfig(**certificates.block("gateway")),
            api_keys_file=str(callers),
        )
        gateway = Gateway(config, Access(config.api_keys_file))
        https = https_context(certificates.file("gateway.crt"), certificates.file("gateway.key"))
        server = await start_http_server("127.0.0.1:0", build_app(gateway), https=https)
        try:
            await router.attached(1)
            await until(lambda: router.router.predictions.connected)
            trusting = ssl.create_default_context(cafile=certificates.file("ca.crt"))
            async with httpx.AsyncClient(base_url=f"https://{server.address}", verify=trusting) as http:
                answer = await http.post(
                    "/v1/completions",
                    json={"prompt": "x", "max_tokens": 5, "temperature": 0},
                    headers={"authorization": "Bearer a-key"},
                    timeout=30,
                )
                assert answer.status_code == 200, answer.text
                assert answer.json()["usage"]["completion_tokens"] == 5
                plaintext = await plaintext_answer(server.address)
                assert b"200" not in plaintext
            async with AsyncClient(
                router.router.address, credentials=certificates.client("client"), api_key="a-key"
            ) as client:
                await client.generate("x", sampling=SamplingParams(max_tokens=5, temperature=0), sinks=["copy"])
            async with asyncio.timeout(20):
                await sink.ended.wait()
            assert sink.token_ids == [66 + i for i in range(5)]
        finally:
            registering.cancel()
            await asyncio.gather(registering, return_exceptions=True)
            await server.stop()
            await gateway.close()
    await worker.stop()
    stop.set()
    assert await predicting == 0
