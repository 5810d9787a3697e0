"""Decisions as JSON lines in a file: written by a thread, bounded, never in the way of serving."""

import queue
import threading
from pathlib import Path

import orjson

from services.router import metrics
from services.router.request import DecisionRecord, LiveRequest

_MAX_PENDING = 20_000


class DecisionLog:
    """Writes decisions; without a path it does nothing."""

    def __init__(self, path: str) -> None:
        """Open the file for appending. Raises OSError."""
        self._queue: queue.Queue[bytes | None] = queue.Queue(_MAX_PENDING)
        self._file = Path(path).open("ab") if path else None  # noqa: SIM115 - closed by the writing thread
        self._thread = threading.Thread(target=self._write, name="decision-log", daemon=True) if path else None
        if self._thread is not None:
            self._thread.start()

    def write(self, request: LiveRequest, record: DecisionRecord) -> None:
        """Append a decision; dropped and counted when the disk cannot follow."""
        if self._file is None:
            return
        line = {
            "request_id": request.spec.request_id,
            "at_ms": round(record.at_s * 1000, 3),
            "kind": record.kind,
            "rule": record.rule,
            "from": record.from_worker_id,
            "to": record.to_worker_id,
            "predicted_ttft_ms": round(record.predicted_ttft_s * 1000, 3),
            "prompt_tokens": request.spec.prompt_tokens,
            "slo_class": request.spec.slo_class,
        }
        try:
            self._queue.put_nowait(orjson.dumps(line) + b"\n")
        except queue.Full:
            metrics.DECISION_LOG_DROPPED.inc()

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what is pending and close the file; waits at most timeout_s."""
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
