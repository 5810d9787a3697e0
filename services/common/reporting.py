"""Writing reports to a client-streaming call for as long as it lives."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

_Report = TypeVar("_Report", contravariant=True)


class ReportCall(Protocol[_Report]):
    """A client-streaming call that is written, as `grpc.aio` has it."""

    def done(self) -> bool: ...
    def cancel(self) -> bool: ...
    async def wait_for_connection(self) -> None: ...
    async def write(self, request: _Report) -> None: ...
    def __await__(self) -> Any: ...


async def write_reports(call: ReportCall[_Report], due: Callable[[], _Report | None], every_s: float) -> None:
    """Write what is due, every `every_s` seconds, until the call ends; nothing is taken before it has a connection.

    The call is written rather than given an iterator: gRPC goes on reading an iterator whose call has ended until a
    write fails, so that it competes with its successor for what is due, and loses what it wins.

    Args:
        due: returns the next report, or nothing when all have been written.

    Raises:
        grpc.aio.AioRpcError: when the call fails.
    """
    try:
        await call.wait_for_connection()
        with contextlib.suppress(asyncio.InvalidStateError):  # it ended while it was written
            while not call.done():
                while not call.done() and (report := due()) is not None:
                    await call.write(report)
                await asyncio.sleep(every_s)
        await call
    finally:
        call.cancel()
