"""A sink that prints the copies it receives: `python examples/token_sink.py`.

Name it in the router's configuration, `sinks: {console: {address: "127.0.0.1:7400"}}`, and in requests:
`client.stream(prompt, sinks=["console"])`.
"""

import asyncio
import contextlib
import os
from collections.abc import Sequence

from ascendra import SinkEnd, TokenSink, serve_sink

LISTEN = os.environ.get("ASCENDRA_SINK_LISTEN", "127.0.0.1:7400")


class ConsoleSink(TokenSink):
    """Prints every event."""

    async def on_tokens(self, request_id: str, offset: int, token_ids: Sequence[int], text: str) -> None:
        """Print new text."""
        print(f"{request_id} {offset:>5} {text!r}")

    async def on_gap(self, request_id: str, first_offset: int, end_offset: int) -> None:
        """Print what is missing."""
        print(f"{request_id} tokens {first_offset} to {end_offset - 1} are missing")

    async def on_finished(self, request_id: str, text: str, end: SinkEnd) -> None:
        """Print the end."""
        print(f"{request_id} {end.completion_tokens:>5} {text!r} {end.reason}")


async def main() -> None:
    """Serve until Ctrl-C."""
    async with serve_sink(ConsoleSink(), LISTEN) as address:
        print(f"listening on {address}")
        await asyncio.Event().wait()


with contextlib.suppress(KeyboardInterrupt):
    asyncio.run(main())
