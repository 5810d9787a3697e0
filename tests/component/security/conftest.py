"""What the security tests share: certificates, callers, and a cluster that asks for both."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ascendra import AsyncClient, SamplingParams
from services.common.tls import TlsConfig
from tests.support.certificates import Certificates
from tests.support.local_router import LocalRouter, local_router, until
from tests.support.scripted_worker import ScriptedWorker
from tests.support.tokenizer_files import write_byte_level


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level tokenizer, without weights."""
    return write_byte_level(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates of every service, and of a client."""
    made = Certificates(tmp_path_factory.mktemp("certificates"))
    for name in ("router", "worker", "predictor", "gateway", "sink", "client"):
        made.issue(name)
    return made


@pytest.fixture
def callers(tmp_path: Path) -> Path:
    """A file of callers: tenants "a" and "b", gateway, worker and "ops"; the key of each is its name and "-key"."""
    content: dict[str, Any] = {name: [digest(f"{name}-key")] for name in ("a", "b")}
    content["gateway"] = {
        "keys": [digest("gateway-key")],
        "certificates": ["gateway"],
        "rights": ["act-for-tenants", "monitor"],
    }
    content["worker"] = {"certificates": ["worker"], "rights": ["register"]}
    content["ops"] = {"keys": [digest("ops-key")], "rights": ["admin"]}
    file = tmp_path / "callers.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def digest(key: str) -> str:
    """Return what the file holds for a key."""
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass
class Fortress:
    """A router that knows its callers, with one scripted worker, both under mutual TLS."""

    router: LocalRouter
    worker: ScriptedWorker
    certificates: Certificates

    @property
    def address(self) -> str:
        """Where the router listens."""
        return self.router.router.address

    @contextlib.asynccontextmanager
    async def client(self, name: str, certificate: str = "client") -> AsyncIterator[AsyncClient]:
        """Return a client that shows the key of a caller; "": none."""
        key = f"{name}-key" if name else ""
        credentials = self.certificates.client(certificate)
        async with AsyncClient(self.address, credentials=credentials, api_key=key) as client:
            yield client

    @contextlib.asynccontextmanager
    async def neighbour(self, tokens: int = 1500) -> AsyncIterator[None]:
        """Run a stream of tenant "a" all the while; it must get every token, and still be running at the end."""
        self.worker.step_s = 0.01
        async with self.client("a") as client:
            stream = client.stream("x", sampling=SamplingParams(max_tokens=tokens))
            first = await anext(stream)
            received = list(first.token_ids)

            async def follow() -> None:
                async for chunk in stream:
                    received.extend(chunk.token_ids)

            following = asyncio.create_task(follow())
            yield
            before = len(received)
            assert not following.done(), "the neighbour's stream has to be longer than the test"
            await until(lambda: len(received) >= before + 5)
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            assert received == [66 + i % 26 for i in range(len(received))]


Defended = Callable[..., contextlib.AbstractAsyncContextManager[Fortress]]


@pytest.fixture
def defended(certificates: Certificates, callers: Path, tokenizer_directory: Path) -> Defended:
    """How to run a fortress; keywords are fields of RouterConfig."""

    @contextlib.asynccontextmanager
    async def run(**keys: Any) -> AsyncIterator[Fortress]:
        worker = ScriptedWorker()
        await worker.start(tls=TlsConfig(**certificates.block("worker", client_names=("router",))))
        settings = {"tls": TlsConfig(**certificates.block("router")), "api_keys_file": str(callers), **keys}
        client = certificates.client("client")
        try:
            async with local_router(tokenizer_directory, [worker.address], client=client, **settings) as router:
                await router.attached(1)
                yield Fortress(router, worker, certificates)
        finally:
            await worker.stop()

    return run


@pytest.fixture
async def fortress(defended: Defended) -> AsyncIterator[Fortress]:
    """A fortress without quotas."""
    async with defended() as running:
        yield running
