"""TLS between services over real sockets: who gets in, who does not, and files that are replaced."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ascendra import Tls
from ascendra.v1 import inference_pb2, inference_pb2_grpc
from services.common.access import named_peers
from services.common.channels import Connector, open_channel
from services.common.grpc_server import start_grpc_server
from services.common.health_probe import probe
from services.common.tls import TlsConfig, check_listener, https_context, is_local
from tests.support.certificates import Certificates


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    """An authority with certificates for a server and a client."""
    made = Certificates(tmp_path)
    for name in ("server", "client"):
        made.issue(name)
    return made


@contextlib.asynccontextmanager
async def serving(tls: TlsConfig) -> AsyncIterator[str]:
    """Serve health with TLS; yields the address."""
    server = await start_grpc_server("127.0.0.1:0", lambda _: [], tls=tls, authorize=named_peers(tls))
    try:
        yield server.address
    finally:
        await server.stop(0)


async def ask(channel: grpc.aio.Channel) -> str:
    """Return a server's health, or the code of the failure."""
    try:
        response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


async def health(address: str, tls: Tls | None) -> str:
    """Return what a client with these certificates gets."""
    async with open_channel(address, tls) as channel:
        return await ask(channel)


async def test_only_clients_with_a_valid_certificate_get_in(certificates: Certificates) -> None:
    """No certificate, a wrong authority, an expired one, plaintext, a wrong server name: all fail in the handshake."""
    certificates.issue("expired", valid_for=timedelta(minutes=-5))
    refused = {
        "no certificate": certificates.client(),
        "wrong authority": certificates.stranger("client"),
        "expired": certificates.client("expired"),
        "plaintext": None,
        "server of an authority that the client does not trust": certificates.mistrustful("client"),
        "another server than meant": certificates.client("client", server_name="elsewhere"),
    }
    async with serving(TlsConfig(**certificates.block("server"))) as address:
        assert await health(address, certificates.client("client")) == "SERVING"
        answers = {why: await health(address, tls) for why, tls in refused.items()}
        assert answers == dict.fromkeys(refused, "UNAVAILABLE")
        assert await health(address, certificates.client("client", server_name="server")) == "SERVING"


class _Lister(inference_pb2_grpc.InferenceServiceServicer):
    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse()


async def test_certificates_of_other_names_may_only_ask_for_health(certificates: Certificates) -> None:
    """A port for routers refuses what the same authority has issued to others."""
    certificates.issue("router")
    tls = TlsConfig(**certificates.block("server", client_names=("router",)))

    def register(server: grpc.aio.Server) -> list[str]:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(_Lister(), server)  # type: ignore[abstract]
        return []

    async def ask_for_models(address: str, name: str) -> None:
        async with open_channel(address, certificates.client(name)) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=20, wait_for_ready=True)

    server = await start_grpc_server("127.0.0.1:0", register, tls=tls, authorize=named_peers(tls))
    await ask_for_models(server.address, "router")
    with pytest.raises(grpc.aio.AioRpcError, match="PERMISSION_DENIED"):
        await ask_for_models(server.address, "client")
    assert await health(server.address, certificates.client("client")) == "SERVING"
    await server.stop(0)


async def test_a_server_follows_its_files(certificates: Certificates, tmp_path: Path) -> None:
    """New connections get new files, a new authority's too; old connections stay, half-written files do no harm."""
    tls = TlsConfig(**certificates.block("server"))
    before = Certificates(tmp_path / "before")
    for file in certificates.folder.iterdir():
        (before.folder / file.name).write_bytes(file.read_bytes())
    async with serving(tls) as address, open_channel(address, before.client("client")) as old:
        assert await ask(old) == "SERVING"
        certificates.write("server.key", "half a key")
        assert await health(address, certificates.client("client")) == "SERVING"
        for file in certificates.folder.iterdir():
            file.unlink()
        renewed = Certificates(tmp_path)
        for name in ("server", "client"):
            renewed.issue(name)
        assert await health(address, renewed.client("client")) == "SERVING"
        assert await health(address, before.client("client")) == "UNAVAILABLE"
        assert await ask(old) == "SERVING"


async def test_a_client_follows_its_files(certificates: Certificates) -> None:
    """A connector shows a certificate that was renewed after it had expired."""
    certificates.issue("client", valid_for=timedelta(minutes=-5))
    async with serving(TlsConfig(**certificates.block("server"))) as address:
        connector = Connector(address, certificates.client("client"))
        assert await ask(await connector.channel()) == "UNAVAILABLE"
        certificates.issue("client")
        assert await ask(await connector.channel()) == "SERVING"
        assert await connector.channel() is await connector.channel()
        await connector.close()


async def test_the_health_probe_shows_the_services_own_certificate(certificates: Certificates) -> None:
    """A container's health check gets through mutual TLS."""
    async with serving(TlsConfig(**certificates.block("server"))) as address:
        answer = await asyncio.to_thread(probe, address, timeout_s=20, tls=certificates.client("server"))
        assert answer == "SERVING"


async def test_https_follows_its_files(certificates: Certificates) -> None:
    """The next handshake shows the new certificate."""
    context = https_context(certificates.file("server.crt"), certificates.file("server.key"))
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]

    async def shown() -> bytes:
        trusting = ssl.create_default_context(cafile=certificates.file("ca.crt"))
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting, server_hostname="server")
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return bytes(certificate)

    async with server:
        first = await shown()
        assert await shown() == first
        certificates.issue("server")
        assert await shown() != first


@pytest.mark.parametrize(
    ("listen", "local"),
    [
        ("127.0.0.1:7100", True),
        ("127.8.9.1:7100", True),
        ("[::1]:7100", True),
        ("localhost:7100", True),
        ("unix:/run/router", True),
        ("0.0.0.0:7100", False),
        ("[::]:7100", False),
        ("10.1.2.3:7100", False),
        ("worker-lp:50061", False),
        (":7100", False),
    ],
)
def test_plaintext_is_for_this_machine_only(listen: str, local: bool) -> None:
    """What others can reach needs certificates, or an explicit word."""
    assert is_local(listen) is local
    check_listener(listen, TlsConfig(), insecure=True)
    check_listener(listen, TlsConfig(cert="a", key="b", ca="c"), insecure=False)
    if local:
        check_listener(listen, TlsConfig(), insecure=False)
    else:
        with pytest.raises(ValueError, match="plaintext"):
            check_listener(listen, TlsConfig(), insecure=False)


@pytest.mark.parametrize(
    "block", [{"cert": "a"}, {"key": "a"}, {"cert": "a", "key": "b"}, {"ca": "c", "client_names": ("router",)}]
)
def test_half_a_configuration_is_refused(block: dict[str, Any]) -> None:
    """A missing file must not silently turn a check off."""
    with pytest.raises(ValueError, match="tls"):
        TlsConfig(**block)


async def test_unusable_files_are_refused_at_the_start(certificates: Certificates) -> None:
    """A key that does not belong to the certificate, or a missing file, is found before the port opens."""
    for block in (
        certificates.block("server", key=certificates.file("client.key")),
        certificates.block("server", ca=certificates.file("none.crt")),
    ):
        with pytest.raises(ValueError, match="tls"):
            await start_grpc_server("127.0.0.1:0", lambda _: [], tls=TlsConfig(**block))
