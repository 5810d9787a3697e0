"""`ascendra up` as a user runs it: real processes, real signals."""

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ascendra import AsyncClient, SamplingParams
from ascendra.cli.tether import tethered

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(300)]

START_S = 180.0
STOP_S = 60.0


class Up:
    """A running `ascendra up`."""

    def __init__(self, model: Path, work_dir: Path) -> None:
        arguments = ["up", "--engine", "emulated", "--lp", "1", "--hp", "1", "--routers", "2", "--port", "0"]
        arguments += ["--gateway", "0"]
        self.process = subprocess.Popen(
            tethered([*_ascendra(*arguments), "--model", str(model), "--work-dir", str(work_dir)]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait_for(self, pattern: str, timeout_s: float = START_S) -> re.Match[str]:
        """Wait for output that matches."""
        self.until(lambda: re.search(pattern, self.output) is not None, timeout_s, what=pattern)
        found = re.search(pattern, self.output)
        assert found is not None
        return found

    def until(self, condition: Callable[[], bool], timeout_s: float, *, what: str) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}; output:\n{self.output}"
            assert self.process.poll() is None, f"ended while waiting for {what}; output:\n{self.output}"
            time.sleep(0.05)

    def descendants(self) -> list[psutil.Process]:
        """Return the processes below it."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def close(self) -> None:
        """Kill it; its children follow."""
        self.process.kill()
        self.process.wait()
        self._reader.join(STOP_S)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line


@pytest.fixture
def up(tiny_model: Path, tmp_path: Path) -> Iterator[Up]:
    """A cluster that was told to start, without waiting for it."""
    running = Up(tiny_model, tmp_path)
    try:
        yield running
    finally:
        running.close()


def test_a_cluster_serves_recovers_and_stops(up: Up) -> None:
    """It generates text, serves HTTP, shows its status, survives a killed router; Ctrl-C leaves nothing behind."""
    up.wait_for("Ascendra is up")
    address = up.wait_for(r"router-0\s+(127\.0\.0\.1:\d+)")[1]

    answer = _run("generate", "once upon a time", "--max-tokens", "8", "--address", address)
    assert answer.stdout.strip()
    assert "TTFT" in answer.stderr

    openai = up.wait_for(r"gateway\s+(http://127\.0\.0\.1:\d+/v1)")[1]
    with urllib.request.urlopen(f"{openai}/models", timeout=START_S) as response:
        assert json.load(response)["data"][0]["object"] == "model"

    status = json.loads(_run("status", "--once", "--json", "--address", address).stdout)
    assert {worker["worker_id"]: worker["role"] for worker in status["workers"]} == {
        "lp-0": "ROLE_LOW_PRIORITY",
        "hp-0": "ROLE_HIGH_PRIORITY",
    }

    other = up.wait_for(r"router-1\s+(127\.0\.0\.1:\d+)")[1]
    asyncio.run(_stream_while_its_router_dies(up, [address, other]))
    up.wait_for("router-0 ended with status")
    up.wait_for("router-0 ready again")
    up.until(lambda: _generates(address), START_S, what="the same address to serve again")

    descendants = up.descendants()
    assert descendants
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(STOP_S) == 0
    _, alive = psutil.wait_procs(descendants, timeout=STOP_S)
    assert alive == []


def test_ctrl_c_while_starting_stops_everything(up: Up) -> None:
    """A cluster that is not up yet ends as cleanly."""
    up.until(lambda: len(up.descendants()) >= 3, START_S, what="the processes")
    descendants = up.descendants()
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(STOP_S) == 0
    _, alive = psutil.wait_procs(descendants, timeout=STOP_S)
    assert alive == []


def test_children_die_with_a_killed_parent(up: Up) -> None:
    """kill -9 of `ascendra up` orphans nothing."""
    up.until(lambda: len(up.descendants()) >= 3, START_S, what="the processes")
    descendants = up.descendants()
    up.process.kill()
    _, alive = psutil.wait_procs(descendants, timeout=STOP_S)
    assert alive == []


async def _stream_while_its_router_dies(up: Up, addresses: list[str]) -> None:
    """The stream goes on through the other router, with no token lost or repeated."""
    routers = [process for process in up.descendants() if "services.router" in process.cmdline()]
    [first] = [process for process in routers if "router-0" in process.cmdline()]
    received: list[int] = []
    async with AsyncClient(addresses) as client:
        async for chunk in client.stream("once", sampling=SamplingParams(max_tokens=60, ignore_eos=True, seed=1)):
            assert chunk.token_offset == len(received)
            received.extend(chunk.token_ids)
            if first.is_running() and len(received) >= 5:
                first.kill()
                first.wait(STOP_S)
    assert not first.is_running()
    assert len(received) == 60


def _generates(address: str) -> bool:
    with contextlib.suppress(subprocess.CalledProcessError):
        return bool(_run("generate", "once", "--max-tokens", "2", "--address", address).stdout.strip())
    return False


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(_ascendra(*arguments), check=True, capture_output=True, text=True, timeout=STOP_S)


def _ascendra(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ascendra.cli", *arguments]
