"""JSON lines in a file: written by a thread, bounded, never in the way of serving."""

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

_MAX_PENDING = 20_000
_GATHER_S = 0.1
"""Between two looks at what there is to write."""


class LineLog:
    """Appends to a file; without a path it does nothing."""

    def __init__(self, path: str, name: str, on_drop: Callable[[], None]) -> None:
        """Open the file for appending. Raises OSError.

        Args:
            path: of the file; empty: none.
            name: of the writing thread.
            on_drop: called for each line that is dropped because the disk cannot follow.
        """
        self._on_drop = on_drop
        self._closing = threading.Event()
        self._queue: queue.Queue[bytes | None] = queue.Queue(_MAX_PENDING)
        self._file = Path(path).open("ab") if path else None  # noqa: SIM115 - closed by the writing thread
        self._thread = threading.Thread(target=self._write, name=name, daemon=True) if path else None
        if self._thread is not None:
            self._thread.start()

    @property
    def writes(self) -> bool:
        """Whether there is a file."""
        return self._file is not None

    def append(self, line: dict[str, Any]) -> None:
        """Append a line; dropped when the disk cannot follow."""
        if self._file is None:
            return
        try:
            self._queue.put_nowait(orjson.dumps(line) + b"\n")
        except queue.Full:
            self._on_drop()

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what is pending and close the file; waits at most timeout_s."""
        self._closing.set()
        if self._thread is not None:
            try:
                self._queue.put(None, timeout=timeout_s)
            except queue.Full:
                return
            self._thread.join(timeout_s)

    def _write(self) -> None:
        assert self._file is not None
        with self._file as file:
            while (line := self._queue.get()) is not None:
                file.write(line)
                if self._queue.empty():
                    file.flush()
                    # A thread that woke for every line would take the interpreter from the event loop each time.
                    self._closing.wait(_GATHER_S)
