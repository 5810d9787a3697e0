"""The commands that talk to a router, over a real socket."""

import asyncio
import importlib.metadata
import io
import json
from pathlib import Path
from typing import Any

import pytest

from ascendra.cli import main
from ascendra.cli.cluster import ClusterSpec, LocalCluster
from ascendra.cli.options import CliError
from ascendra.v1 import cluster_pb2, inference_pb2
from services.common import errors
from tests.support import scripted_router as scripted
from tests.support.scripted_router import Fail, ScriptedRouter, counting


@pytest.fixture
def address(router_in_a_thread: ScriptedRouter) -> list[str]:
    """The flag that names the router."""
    return ["--address", router_in_a_thread.address]


def test_generate_streams_text_and_says_what_became_of_the_objective(
    router_in_a_thread: ScriptedRouter, address: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Text goes to stdout, the receipt to stderr; flags reach the request."""
    flags = ["--max-tokens", "7", "--temperature", "0", "--ttft-ms", "300", "--stop", "x", "--on-overload", "refuse"]
    assert main(["generate", "hello", *flags, *address]) == 0
    output = capsys.readouterr()
    assert output.out == " 0 1 2 3 4\n"
    assert "TTFT 12 ms (within 500)" in output.err
    assert "p99 gap 60 ms (over 50)" in output.err
    assert "HP pool (w0 > w1)" in output.err
    [request] = router_in_a_thread.requests
    assert request.text == "hello"
    assert (request.sampling.max_tokens, request.sampling.temperature) == (7, 0)
    assert request.slo.ttft_ms == 300
    assert request.on_overload == inference_pb2.OVERLOAD_ACTION_REFUSE


def test_generate_reads_stdin_and_prints_json(
    router_in_a_thread: ScriptedRouter,
    address: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a prompt stdin is read; --json prints the completion with its receipt."""
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin"))
    assert main(["generate", "--json", "--chat", "--system", "be brief", *address]) == 0
    completion = json.loads(capsys.readouterr().out)
    assert completion["token_ids"] == [0, 1, 2, 3, 4]
    assert completion["finish_reason"] == "length"
    assert completion["receipt"]["pool"] == "high"
    [request] = router_in_a_thread.requests
    assert [message.content for message in request.chat.messages] == ["be brief", "from stdin"]


def test_chat_keeps_the_conversation(
    router_in_a_thread: ScriptedRouter,
    address: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers become part of the conversation; /reset forgets it; the end of input ends it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n/reset\nthree\n"))
    assert main(["chat", *address]) == 0
    sent = [[message.content for message in request.chat.messages] for request in router_in_a_thread.requests]
    assert sent == [["one"], ["one", " 0 1 2 3 4", "two"], ["three"]]
    assert len({request.session_id for request in router_in_a_thread.requests}) == 1
    assert capsys.readouterr().out.count(" 0 1 2 3 4") == 3


def test_status_once(address: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The table names workers, pools and attainment; the JSON has every field."""
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["status", "--once", *address]) == 0
    table = capsys.readouterr().out
    for part in ("w0", "LP", "w1", "HP", "connecting", "210 ms", "95.0%", "offloads 3"):
        assert part in table
    assert main(["status", "--once", "--json", *address]) == 0
    status = json.loads(capsys.readouterr().out)
    assert [worker["worker_id"] for worker in status["workers"]] == ["w0", "w1"]
    assert status["workers"][1]["waiting"] == 0


def test_explain_prints_the_decisions(
    address: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request's decisions are printed in order with their rules."""
    monkeypatch.setenv("COLUMNS", "200")
    main(["generate", "x", *address])
    request_id = capsys.readouterr().err.rsplit("id ", 1)[1].strip()
    assert main(["explain", request_id, *address]) == 0
    output = capsys.readouterr().out
    assert output.index("least predicted work") < output.index("laxity below margin")
    assert "w1: high priority" in output


def test_role_and_drain(address: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A worker's role is changed, or it is drained, by its id."""
    assert main(["role", "w1", "low", *address]) == 0
    assert main(["drain", "w0", "--timeout-s", "2", *address]) == 0
    assert main(["drain", "w0", "--timeout-s", "0", *address]) == 0
    assert capsys.readouterr().out == "w1: low\n" + 2 * "w0: draining, 3 requests left\n"


def test_failures_are_one_line_a_hint_and_a_status(
    router_in_a_thread: ScriptedRouter, address: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """1 after a failure, 2 after wrong usage, never a traceback."""
    assert main(["drain", "w9", *address]) == 1
    assert capsys.readouterr().err == "error: worker_id: no worker 'w9'; workers: w0, w1\n"
    refusal = errors.ResourceExhausted("no worker can make it", retry_after_ms=1500)
    router_in_a_thread.script = scripted.always(Fail(refusal))
    assert main(["generate", "x", *address]) == 1
    assert capsys.readouterr().err == "error: no worker can make it\nhint: try again in 1.5 s\n"
    assert main(["generate", "x", "--ttft-ms", "-1", *address]) == 2
    assert "slo.ttft_ms" in capsys.readouterr().err
    assert main(["generate", "x", "--address", "127.0.0.1:1"]) == 1
    unreachable = capsys.readouterr().err
    assert "no connection to the router at 127.0.0.1:1" in unreachable
    assert "ascendra up" in unreachable


@pytest.mark.parametrize(
    "arguments",
    [
        ["up", "--lp", "0"],
        ["up", "--model", "/nowhere"],
        ["demo", "--rate", "0"],
        ["generate", ""],
        ["generate", "x", "--address", ","],
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be meant is refused before anything starts."""
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("seconds", ["-1", "inf", "nan"])
@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["status", "--interval-s"], "interval_s"),
        (["status", "--json", "--interval-s"], "interval_s"),
        (["drain", "w0", "--timeout-s"], "timeout_s"),
        (["generate", "x", "--timeout-s"], "timeout_s"),
    ],
)
def test_an_impossible_time_is_refused(
    command: list[str], name: str, seconds: str, address: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line that names it."""
    assert main([*command[:-1], f"{command[-1]}={seconds}", *address]) == 2
    assert capsys.readouterr().err.strip() == f"error: {name}: must be above 0 seconds, got {seconds}"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The SDK's version is printed."""
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith(f"ascendra {importlib.metadata.version('ascendra')}\n")


@pytest.mark.parametrize("option", ["--port", "--gateway"])
def test_up_says_which_port_is_taken(
    router_in_a_thread: ScriptedRouter, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A port in use is reported before anything starts."""
    port = router_in_a_thread.address.rpartition(":")[2]
    assert main(["up", "--port", "0", option, port, "--work-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error == f"error: port {port}: Address already in use\nhint: choose another with {option}; 0 picks one\n"


@pytest.mark.parametrize(
    ("ports", "message"),
    [
        (["--port", "70000"], "--port: port 70000 is above 65535"),
        (["--port", "65535", "--routers", "2"], "--port: port 65536 is above 65535"),
        (["--port", "0", "--gateway", "70000"], "--gateway: port 70000 is above 65535"),
        (["--port", "7154", "--routers", "2", "--gateway", "7155"], "--gateway: port 7155 is that of a router"),
    ],
)
def test_up_refuses_impossible_ports(
    ports: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, before anything starts."""
    assert main(["up", *ports, "--work-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


class LockedRouter(ScriptedRouter):
    """Answers only those who show a key."""

    async def GetStatus(self, request: cluster_pb2.GetStatusRequest, context: Any) -> cluster_pb2.GetStatusResponse:
        """Refuse."""
        raise errors.Unauthenticated("a valid API key is required")


async def test_up_says_that_the_routers_ask_for_a_key(tmp_path: Path) -> None:
    """At once: no worker has to do with it."""
    router = LockedRouter(counting(1))
    await router.start()
    try:
        spec = ClusterSpec(lp=1, hp=0, engine="emulated", routers=1, port=0, work_dir=tmp_path)
        cluster = LocalCluster(spec, print)
        cluster.addresses = {"router-0": router.address}
        async with asyncio.timeout(10):
            with pytest.raises(CliError, match="router-0: a valid API key is required") as caught:
                await cluster._attached()
        assert "api-keys-file" in caught.value.hint
    finally:
        await router.stop()


def test_up_says_how_to_get_a_model_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name of the Hugging Face hub is no folder; what can only be a folder gets no such advice."""
    monkeypatch.chdir(tmp_path)
    assert main(["up", "--model", "org/some-model_1.5B"]) == 2
    assert capsys.readouterr().err == (
        "error: --model: org/some-model_1.5B is not a directory\n"
        "hint: hf download org/some-model_1.5B --local-dir DIR, then --model DIR\n"
    )
    for folder in ("/nowhere/model", "../model", "a/b/c", "model"):
        assert main(["up", "--model", folder]) == 2
        assert "hint" not in capsys.readouterr().err
