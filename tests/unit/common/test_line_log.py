"""The file that services append JSON lines to."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.common import line_log
from services.common.line_log import LineLog


def test_lines_are_appended_and_whole_after_closing(tmp_path: Path) -> None:
    """Two logs after each other on one file; nothing is written without a path."""
    file = tmp_path / "lines.jsonl"
    for round_number in range(2):
        log = LineLog(str(file), "test-log", lambda: pytest.fail("dropped"))
        assert log.writes
        for number in range(100):
            log.append({"round": round_number, "number": number})
        log.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["round"], line["number"]) for line in lines] == [(r, n) for r in range(2) for n in range(100)]
    nothing = LineLog("", "test-log", lambda: pytest.fail("dropped"))
    nothing.append({"number": 1})
    nothing.close()
    assert not nothing.writes


def test_a_disk_that_cannot_follow_costs_lines_not_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that nobody reads yet: as many lines wait as may, each further one counts, and nobody waits for it."""
    monkeypatch.setattr(line_log, "_MAX_PENDING", 10)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    dropped: list[int] = []
    log = LineLog(str(pipe), "test-log", lambda: dropped.append(1))
    line = {"filling": "x" * 100_000}  # more than a pipe holds
    began_s = time.monotonic()
    for _ in range(30):
        log.append(line)
    log.close(timeout_s=0.1)
    assert time.monotonic() - began_s < 5
    assert 18 <= len(dropped) <= 20
    os.set_blocking(reader, True)
    with ThreadPoolExecutor() as pool, os.fdopen(reader, "rb") as file:
        read = pool.submit(file.read)
        log.close(timeout_s=10)
        lines = read.result(timeout=10).splitlines()
    assert len(lines) == 30 - len(dropped)
    assert all(json.loads(one) == line for one in lines)
