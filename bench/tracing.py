"""`python -m bench.tracing`: processor time that spans cost a router and a worker, off, not sampled, and exported.

Runs the life of a request as the router and the worker keep it (accept, place, first token, tokens, end), again and
again, with everything of it but the network between the two. Spans are exported by OTLP to another process; the
exporting thread's time counts. Rounds of the modes alternate, and the median of the rounds is reported.
"""

import argparse
import asyncio
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from ascendra.v1 import common_pb2, inference_pb2
from services.common.tracing import Tracer
from services.policy.state import Slo
from services.router.request import DecisionRecord, LiveRequest, RequestSpec
from services.router.tracing import RequestTrace
from services.worker.tracing import AttemptTrace

MODES = ("off", "not_sampled", "exported")
_FACTS = {"worker": "w0", "role": "low", "model_name": "bench", "engine_kind": "emulated", "vllm_version": ""}


class _NoSink:
    """Takes a stream and does nothing with it."""

    def __getattr__(self, _: str) -> Any:
        return lambda *_: True


def serve_one(router: Tracer | None, worker: Tracer | None, tokens: int) -> None:
    """Run the life of one request."""
    now_s = time.monotonic()
    message = inference_pb2.GenerateRequest(text="x")
    trace = RequestTrace(router, message, "bench", "", now_s) if router is not None else None
    sampling = common_pb2.SamplingParameters(max_tokens=tokens, temperature=0.0, seed=1)
    spec = RequestSpec(request_id="r", prompt=b"\0" * 400, sampling=sampling, slo=Slo(ttft_s=1.0, tbt_s=0.1))
    request = LiveRequest(spec, now_s, None, _NoSink())
    if trace is not None:
        request.trace = trace
        trace.checked(spec, 0)
    number = request.place("w0", common_pb2.ROLE_LOW_PRIORITY, "place: least predicted work")
    record = DecisionRecord(0.0, "place", "least predicted work", to_worker_id="w0", predicted_ttft_s=0.1)
    request.decide(record)
    if request.trace is not None:
        request.trace.decided(record)
    submit = request.submission(1, now_s)
    attempt = AttemptTrace(worker, submit, _FACTS) if worker is not None else None
    request.started(number, now_s)
    if attempt is not None:
        attempt.event("prefill_started")
    for offset in range(tokens):
        if attempt is not None:
            attempt.tokens(1)
        request.tokens(number, offset, (7,), now_s)
        if offset == 0 and request.trace is not None:
            request.trace.first_token(request.ttft_s, 0)
    if attempt is not None:
        attempt.finished("length", 0)
        attempt.ends()
    request.finish(common_pb2.FINISH_REASON_LENGTH)
    if request.trace is not None:
        request.trace.ends(request, "finished")


async def measure(endpoint: str, requests: int, tokens: int, rounds: int, pause_s: float) -> dict[str, list[float]]:
    """Return microseconds of processor time a request, by mode and round."""
    spent: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for mode in MODES:
            tracers: list[Tracer | None] = [None, None]
            if mode != "off":
                ratio = float(mode == "exported")
                tracers = [Tracer(name, "bench", endpoint, ratio) for name in ("router", "worker")]
            began_s = time.process_time()
            for index in range(requests):
                serve_one(tracers[0], tracers[1], tokens)
                if index % 50 == 49:
                    await asyncio.sleep(pause_s)  # a real service leaves the exporting thread its turn, too
            for tracer in filter(None, tracers):
                await tracer.close()
            spent[mode].append((time.process_time() - began_s) / requests * 1e6)
    return spent


def collect() -> None:
    """Serve OTLP on a free port until stdin ends, dropping everything."""
    server = grpc.server(ThreadPoolExecutor(1))
    drop = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": drop}),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    sys.stdin.read()
    server.stop(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write a result file; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.tracing", description="What spans cost.")
    parser.add_argument("--requests", type=int, default=2000, help="requests a round (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="tokens a request (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each mode (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--collect", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.collect:
        collect()
        return 0
    with subprocess.Popen(
        [sys.executable, "-m", "bench.tracing", "--collect"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as collector:
        assert collector.stdout is not None
        assert collector.stdin is not None
        endpoint = f"http://127.0.0.1:{int(collector.stdout.readline())}"
        spent = asyncio.run(measure(endpoint, arguments.requests, arguments.tokens, arguments.rounds, 0.002))
        collector.stdin.close()
    medians = {mode: statistics.median(rounds) for mode, rounds in spent.items()}
    print("| spans | us a request, router and worker | more than off |\n|---|---|---|")
    for mode, median in medians.items():
        print(f"| {mode} | {median:.0f} | {median - medians['off']:.0f} |")
    if arguments.out:
        result = {
            "command": f"python -m bench.tracing --requests {arguments.requests} --tokens {arguments.tokens}"
            f" --rounds {arguments.rounds}",
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
            "us_per_request": {mode: [round(value, 1) for value in rounds] for mode, rounds in spent.items()},
            "median_us_per_request": {mode: round(value, 1) for mode, value in medians.items()},
        }
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
