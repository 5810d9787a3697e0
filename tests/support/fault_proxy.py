"""A TCP proxy with faults: latency, little bandwidth, resets, and silence as of a network that is cut.

What is sent while the network is cut is not lost: like TCP's own retransmissions it arrives when the cut is over,
unless the connection was given up by then.
"""

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

_CHUNK_BYTES = 16_384
_IN_FLIGHT = 64
"""Chunks on their way in one direction; then the sender has to wait, as behind a full window."""


class FaultProxy:
    """Listens on a loopback port and passes everything on to a unix socket.

    Attributes that a test may set at any time:
        latency_s: added in each direction.
        bytes_per_s: most in each direction of a connection; 0: unlimited.
    """

    def __init__(self, target: str) -> None:
        """Prepare; use it as an async context manager.

        Args:
            target: unix:PATH.
        """
        self.latency_s = 0.0
        self.bytes_per_s = 0.0
        self._path = target.removeprefix("unix:")
        self._open = asyncio.Event()
        self._open.set()
        self._epoch = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def address(self) -> str:
        """Where it listens, host:port."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    async def __aenter__(self) -> "FaultProxy":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Let nothing through from now on, new connections included; nobody is told."""
        self._open.clear()

    def heal(self) -> None:
        """Let everything through again."""
        self._open.set()

    def forget(self) -> None:
        """Drop what is on its way, and go on ignoring the present connections without telling anybody."""
        self._epoch += 1

    def reset(self) -> None:
        """Break all connections with a TCP reset."""
        for writer in list(self._writers):
            with contextlib.suppress(OSError):
                if (sock := writer.get_extra_info("socket")) is not None and sock.family == socket.AF_INET:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writers = {writer}
        self._writers.add(writer)
        try:
            await self._open.wait()
            far_reader, far_writer = await asyncio.open_unix_connection(self._path)
            writers.add(far_writer)
            self._writers.add(far_writer)
            async with asyncio.TaskGroup() as pipes:
                pipes.create_task(self._pipe(reader, far_writer))
                pipes.create_task(self._pipe(far_reader, writer))
        except* (OSError, asyncio.CancelledError):
            pass  # either side is gone, or the proxy ends
        finally:
            self._tasks.discard(task)
            self._writers -= writers
            for one in writers:
                one.transport.abort()

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one direction until either end is gone; raises ConnectionError then, which ends the other one too."""
        flying: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_IN_FLIGHT)
        async with asyncio.TaskGroup() as ends:
            ends.create_task(self._take(reader, flying))
            ends.create_task(self._deliver(flying, writer))

    async def _take(self, reader: asyncio.StreamReader, flying: "asyncio.Queue[tuple[float, bytes]]") -> None:
        while data := await reader.read(_CHUNK_BYTES):
            await flying.put((time.monotonic() + self.latency_s, data))
        await flying.put((time.monotonic() + self.latency_s, b""))

    async def _deliver(self, flying: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
        epoch = self._epoch
        while True:
            due_s, data = await flying.get()
            await asyncio.sleep(max(due_s - time.monotonic(), 0))
            if self.bytes_per_s:
                await asyncio.sleep(len(data) / self.bytes_per_s)
            await self._open.wait()
            if epoch != self._epoch:
                continue
            if not data:
                raise ConnectionAbortedError("the other side has closed")
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def proxies(targets: Sequence[str]) -> AsyncIterator[list[FaultProxy]]:
    """Run a proxy for each target."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(FaultProxy(target)) for target in targets]
