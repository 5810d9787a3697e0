"""Who may do what at a router: over real sockets, under mutual TLS."""

import asyncio
import os
import struct
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ascendra import AscendraError, AsyncClient, NotFoundError, PermissionDeniedError, SamplingParams
from ascendra.errors import InvalidArgumentError, UnauthenticatedError
from ascendra.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2
from services.common.channels import open_channel
from services.router.resume import Cursor, write_cursor
from tests.component.security.conftest import Defended, Fortress
from tests.support.local_router import Collected, text_request, until

SAMPLING = SamplingParams(max_tokens=5, temperature=0)


def bearer(name: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a caller."""
    return (("authorization", f"Bearer {name}-key"),)


async def test_only_known_callers_are_served(fortress: Fortress) -> None:
    """No key and a wrong key are refused everywhere; a known one is served."""
    for name in ("", "nobody"):
        async with fortress.client(name) as client, client.session() as session:
            for call in (
                client.generate("x", sampling=SAMPLING),
                session.generate("x", sampling=SAMPLING),
                client.tokenize("x"),
                client.status(),
                client.explain("x"),
                client.drain("w1"),
            ):
                with pytest.raises(UnauthenticatedError) as raised:
                    await call
                assert raised.value.reason == "INVALID_API_KEY"
    async with fortress.client("a") as client, client.session() as session:
        assert len((await client.generate("x", sampling=SAMPLING)).token_ids) == 5
        assert len((await session.generate("x", sampling=SAMPLING)).token_ids) == 5
    assert len(fortress.worker.submitted) == 2


async def test_a_tenant_speaks_for_itself(fortress: Fortress) -> None:
    """The tenant comes from the key; claiming another is refused; a gateway names the tenant of each request."""
    async with fortress.client("a") as client, client.session() as session:
        for call in (client, session):
            with pytest.raises(PermissionDeniedError, match="tenant"):
                await call.generate("x", sampling=SAMPLING, tenant="b")
            await call.generate("x", sampling=SAMPLING, tenant="a")
    async with fortress.client("gateway") as client:
        await client.generate("x", sampling=SAMPLING, tenant="b")
    async with fortress.client("", certificate="gateway") as client:
        await client.generate("x", sampling=SAMPLING, tenant="b", request_id="for-b")
    async with fortress.client("b") as client:
        assert (await client.explain("for-b")).state == "finished"


async def test_requests_of_others_cannot_be_explained(fortress: Fortress) -> None:
    """They look as if they did not exist, live or ended; administrators and the tenant's gateway see them."""
    fortress.worker.hold = True
    async with fortress.client("a") as a, fortress.client("b") as b:
        serving = asyncio.create_task(a.generate("x", sampling=SAMPLING, request_id="mine"))
        await until(lambda: bool(fortress.worker.submitted))
        assert (await a.explain("mine")).request_id == "mine"
        with pytest.raises(NotFoundError) as hidden:
            await b.explain("mine")
        with pytest.raises(NotFoundError) as missing:
            await b.explain("none")
        assert hidden.value.message.replace("mine", "none") == missing.value.message
        with pytest.raises(PermissionDeniedError):
            await b.explain("mine", tenant="a")
        fortress.worker.hold = False
        await serving
        await a.generate("x", sampling=SAMPLING, request_id="ended")
        with pytest.raises(NotFoundError):
            await b.explain("ended")
        async with fortress.client("gateway") as gateway:
            assert (await gateway.explain("ended", tenant="a")).state == "finished"
            for tenant in ("b", ""):
                with pytest.raises(NotFoundError):
                    await gateway.explain("ended", tenant=tenant)
        async with fortress.client("ops") as ops:
            assert (await ops.explain("ended")).state == "finished"


async def test_the_admin_api_is_for_administrators(fortress: Fortress) -> None:
    """Roles and drains need the right; status too; reflection tells nobody else what there is."""
    for name in ("a", "gateway"):
        async with fortress.client(name) as client:
            for call in (client.set_role("w1", "high"), client.drain("w1")):
                with pytest.raises(PermissionDeniedError):
                    await call
    async with fortress.client("a") as client:
        with pytest.raises(PermissionDeniedError):
            await client.status()
    async with fortress.client("gateway") as client:
        assert (await client.status()).workers[0].worker_id == "w1"
    async with fortress.client("ops") as client:
        await client.set_role("w1", "high")
    credentials = fortress.certificates.client("client")
    async with open_channel(fortress.address, credentials) as channel:
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)

        async def services(name: str) -> int:
            question = reflection_pb2.ServerReflectionRequest(list_services="")
            call: Any = reflection.ServerReflectionInfo(iter([question]), metadata=bearer(name))
            return len((await anext(aiter(call))).list_services_response.service)

        assert await services("ops") > 2
        with pytest.raises(grpc.aio.AioRpcError, match="PERMISSION_DENIED"):
            await services("a")


async def test_workers_are_registered_by_workers(fortress: Fortress) -> None:
    """A tenant cannot have prompts sent to an address of its choice; a worker's certificate may."""
    request = cluster_pb2.RegisterWorkerRequest(address="127.0.0.1:9", worker_id="w9", ttl_ms=1000)

    async def register(certificate: str, metadata: Any = ()) -> grpc.StatusCode:
        async with open_channel(fortress.address, fortress.certificates.client(certificate)) as channel:
            stub = cluster_pb2_grpc.ClusterServiceStub(channel)
            try:
                await stub.RegisterWorker(request, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                return error.code()
        return grpc.StatusCode.OK

    assert await register("client") is grpc.StatusCode.UNAUTHENTICATED
    assert await register("client", bearer("a")) is grpc.StatusCode.PERMISSION_DENIED
    assert await register("client", bearer("gateway")) is grpc.StatusCode.PERMISSION_DENIED
    assert await register("worker") is grpc.StatusCode.OK


async def test_a_cancel_reaches_only_its_own_session(fortress: Fortress) -> None:
    """Handles are those of one session: another tenant that cancels, or reuses, the same ones changes nothing."""
    async with fortress.neighbour(), fortress.client("b") as other:
        endpoint = other._endpoints.pick()
        call = endpoint.inference.Session(metadata=bearer("b"))  # type: ignore[call-arg]
        for handle in range(1, 50):
            cancel = inference_pb2.SessionCancel(handle=handle)
            await call.write(inference_pb2.SessionRequest(cancel=cancel))
        start = inference_pb2.SessionStart(handle=1, request=text_request(max_tokens=3))
        await call.write(inference_pb2.SessionRequest(start=start))
        await call.done_writing()
        async for _ in call:
            pass
    await until(lambda: len(fortress.worker.cancelled) == 1)  # the neighbour's own, when it left


def resumed(done: Collected, cursor: bytes) -> inference_pb2.GenerateRequest:
    """Return the request that continues a stream after its second token."""
    request = text_request(max_tokens=20)
    request.resume.cursor = cursor
    request.resume.token_ids = struct.pack("<2I", *done.token_ids[:2])
    request.resume.text_bytes = 2
    return request


async def test_a_cursor_is_good_for_its_tenant_only(defended: Defended, tmp_path: Path) -> None:
    """A cursor of somebody else, or one made up, is refused; the tenant's own continues the stream."""
    key = tmp_path / "resume.key"
    key.write_text("known to routers only\n")
    async with defended(resume_key_file=str(key)) as fortress:
        router = fortress.router
        done = await router.collect(text_request(max_tokens=20), metadata=bearer("a"))
        own = done.accepted.resume_cursor
        again = Collected()
        again.token_ids = done.token_ids[:2]
        async for response in router.inference.Generate(resumed(done, own), metadata=bearer("a")):
            again.add(response)
        assert again.token_ids == done.token_ids
        prompt = fortress.worker.submitted[0].token_ids
        for forged, name in (
            (own, "b"),
            (write_cursor(Cursor(1, 1_000_000), prompt, "a", b""), "a"),
            (write_cursor(Cursor(1, 20), prompt, "b", b"guess"), "b"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await router.collect(resumed(done, forged), metadata=bearer(name))
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "another prompt or tenant" in (raised.value.details() or "")


async def test_a_forged_cursor_gains_nothing_without_a_key(fortress: Fortress) -> None:
    """Unsigned cursors can be made up, but what they ask for is cut to what the request itself may have."""
    router = fortress.router
    done = await router.collect(text_request(max_tokens=20), metadata=bearer("a"))
    prompt = fortress.worker.submitted[0].token_ids
    forged = write_cursor(Cursor(1, 4_000_000_000), prompt, "a", b"")
    call = router.inference.Generate(resumed(done, forged), metadata=bearer("a"))
    await call.read()  # that it was accepted, which may come before the worker is asked
    await until(lambda: len(fortress.worker.submitted) == 2)
    asked = fortress.worker.submitted[-1]
    assert asked.sampling.max_tokens == 2048 - len(prompt) // 4
    call.cancel()


async def test_the_command_line_shows_its_key_and_certificate(fortress: Fortress, tmp_path: Path) -> None:
    """By flag or variable; without them it fails and says what is missing."""
    key = tmp_path / "key"
    key.write_text("ops-key\n")
    files = fortress.certificates.block("client")
    tls = [f"--tls-{name}={files[name]}" for name in ("ca", "cert", "key")]

    async def ascendra(*arguments: str, **variables: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ascendra.cli", *arguments, "--address", fortress.address),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **variables},
        )
        output, _ = await asyncio.wait_for(process.communicate(), 60)
        return process.returncode or 0, output.decode()

    status, output = await ascendra("generate", "x", "--max-tokens", "3", *tls, "--api-key-file", str(key))
    assert status == 0, output
    variables = {f"ASCENDRA_TLS_{name.upper()}": files[name] for name in ("ca", "cert", "key")}
    assert (await ascendra("role", "w1", "high", ASCENDRA_API_KEY="ops-key", **variables))[0] == 0
    status, output = await ascendra("role", "w1", "low", ASCENDRA_API_KEY="a-key", **variables)
    assert (status, "a may not call" in output) == (1, True)
    status, output = await ascendra("role", "w1", "low", **variables)
    assert (status, "API key" in output) == (1, True)


async def test_the_sdk_names_what_is_missing(fortress: Fortress) -> None:
    """A client without certificates gets a connection error that says where, not a hang."""
    async with AsyncClient(fortress.address, api_key="a-key", timeout_s=5) as client:
        with pytest.raises(AscendraError, match=fortress.address):
            await client.generate("x", sampling=SAMPLING)
    with pytest.raises(InvalidArgumentError, match="cannot read"):
        async with AsyncClient(fortress.address, credentials=fortress.certificates.client("none")) as client:
            await client.generate("x", sampling=SAMPLING)
