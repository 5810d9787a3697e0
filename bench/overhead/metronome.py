"""A process of its own that notes when each engine step's message arrives: the clock that latencies are read against.

It attaches to the worker like one more router and keeps one long request running, so every step sends it a message.
"""

import argparse
import array
import asyncio
import sys
import time
from pathlib import Path

import uvloop

from ascendra.v1 import worker_pb2_grpc
from bench.overhead.clients import attach_messages, submit
from services.common.channels import open_channel


async def beat(address: str, tokens: int, out: Path) -> None:
    """Write the monotonic arrival time of each token of one request, as doubles, until it ends."""
    times = array.array("d")
    async with open_channel(address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        call = stub.Attach(attach_messages("metronome", [submit(1, [5, 6, 7], tokens)]))
        try:
            async for message in call:
                kind = message.WhichOneof("message")
                if kind == "failed":
                    raise RuntimeError(message.failed.message)
                if kind != "step":
                    continue
                now_s = time.monotonic()
                first = not times
                times.extend([now_s] * sum(message.step.token_counts))
                if first and times:
                    sys.stdout.write("beating\n")
                    sys.stdout.flush()
                if any(ended.handle == 1 for ended in message.step.ended):
                    break
        finally:
            call.cancel()
            out.write_bytes(times.tobytes())  # noqa: ASYNC240 - the process ends here


async def main(address: str, tokens: int, out: Path) -> None:
    """Beat until the request ends or standard input closes."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    beating = asyncio.create_task(beat(address, tokens, out))
    closed = asyncio.create_task(reader.read())
    await asyncio.wait({beating, closed}, return_when=asyncio.FIRST_COMPLETED)
    closed.cancel()
    if not beating.done():
        beating.cancel()
    await asyncio.gather(beating, return_exceptions=True)
    if not beating.cancelled() and beating.exception():
        raise SystemExit(str(beating.exception()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=100_000)
    arguments = parser.parse_args()
    uvloop.run(main(arguments.address, arguments.tokens, arguments.out))
