"""The predictor as a process."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator

import httpx
import psutil
import pytest

from ascendra.cli.tether import tethered
from ascendra.v1 import common_pb2, predictor_pb2, predictor_pb2_grpc
from services.common.channels import open_channel

LIMIT_S = 60.0
PORTS = ("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0")


async def test_starts_serves_and_stops_with_a_watcher_open() -> None:
    """It says where it is, answers HTTP and gRPC in little memory, and SIGTERM ends it with status 0."""
    process = await asyncio.create_subprocess_exec(
        *tethered([sys.executable, "-m", "services.predictor", *PORTS]),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            assert process.stdout is not None
            ready = json.loads(await process.stdout.readline())
            assert (ready["event"], ready["service"]) == ("ready", "predictor")
            async with open_channel(ready["address"]) as channel, httpx.AsyncClient() as http:
                stub = predictor_pb2_grpc.PredictorServiceStub(channel)
                watch = stub.WatchModels(predictor_pb2.WatchModelsRequest())
                assert not (await anext(aiter(watch))).workers

                steps = [common_pb2.StepTelemetry(step=i, prefill_tokens=100, step_s=0.02) for i in range(1, 100)]

                async def messages() -> AsyncIterator[predictor_pb2.ReportTelemetryRequest]:
                    yield predictor_pb2.ReportTelemetryRequest(worker_id="w", steps=steps)

                assert (await stub.ReportTelemetry(messages())).steps == len(steps)
                assert (await http.get(f"http://{ready['http']}/health")).status_code == 200
                text = (await http.get(f"http://{ready['http']}/metrics")).text
                assert "ascendra_predictor_steps_total 99.0" in text
                assert psutil.Process(process.pid).memory_info().rss < 250 << 20
                process.send_signal(signal.SIGTERM)
                assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("flag", ["--listen", "--metrics-listen"])
def test_a_port_in_use_is_one_line(flag: str) -> None:
    """It is named, with why, and the status is that of a wrong configuration."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "services.predictor", *PORTS, flag, address]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert json.loads(line)["problem"] == f"{address}: Address already in use"
