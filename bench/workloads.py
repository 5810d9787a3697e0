"""Workloads: lengths from a trace file, arrival times from a process or the trace itself, objectives from a named set.

Trace formats, each plain or gzipped (`.gz`), told apart by their first line:

- CSV with `t_s,input_tokens,output_tokens`: seconds from the first request, prompt and output tokens
- CSV with `TIMESTAMP,ContextTokens,GeneratedTokens`: the Azure 2023 traces as published
- CSV with `input_tokens,output_tokens`: lengths only, for Poisson and Gamma arrivals
- CSV with `Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type`: BurstGPT as published
- JSON lines with `timestamp` (ms), `input_length`, `output_length`, `hash_ids`: Mooncake; a hash per 512 prompt tokens
"""

import csv
import gzip
import io
import json
import math
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from services.policy.state import Slo

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace."""

    time_s: float | None
    """Seconds from the first row; None in a file of lengths only."""
    prompt_tokens: int
    output_tokens: int
    prefix_hashes: tuple[int, ...] = ()
    """One per block of `MOONCAKE_BLOCK_TOKENS` prompt tokens; equal hashes are equal prefixes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRequest:
    """One request to send."""

    request_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    slo: Slo
    slo_class: str = ""
    prefix_hashes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SloClass:
    """Objective of a share of the requests."""

    name: str
    ttft_s: float
    tbt_s: float
    share: float = 1.0
    per_unloaded_ttft: float = 0.0
    """Seconds of TTFT objective added per second of unloaded TTFT."""
    unloaded_ttft_s: Callable[[int], float] | None = None
    """TTFT of a prompt of that many tokens on an idle instance."""

    def slo_of(self, prompt_tokens: int) -> Slo:
        """Return the objective of a request."""
        scaled_s = self.per_unloaded_ttft * self.unloaded_ttft_s(prompt_tokens) if self.unloaded_ttft_s else 0.0
        return _slo(self.ttft_s + scaled_s, self.tbt_s)


@lru_cache(1024)
def _slo(ttft_s: float, tbt_s: float) -> Slo:
    """Return an objective; equal ones are one object, which a simulator with many requests in hand is faster for."""
    return Slo(ttft_s=ttft_s, tbt_s=tbt_s)


class TraceFormatError(ValueError):
    """A trace file is not in a documented format; the message names file and line."""


def load_trace(path: Path | str) -> list[TraceRow]:
    """Read a trace of any documented format, ordered by time.

    Raises:
        TraceFormatError: an unknown header, a bad row, or no rows.
        OSError: the file cannot be read.
    """
    path = Path(path)
    try:
        rows = _read_rows(path)
    except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error) as error:
        raise TraceFormatError(f"{path}: {error}") from error
    if not rows:
        raise TraceFormatError(f"{path}: no requests")
    if any(row.time_s is None for row in rows):
        return rows
    rows.sort(key=_time_of)
    start_s = _time_of(rows[0])
    return [TraceRow(_time_of(r) - start_s, r.prompt_tokens, r.output_tokens, r.prefix_hashes) for r in rows]


def _read_rows(path: Path) -> list[TraceRow]:
    rows = []
    with _open_text(path) as lines:
        header = lines.readline().strip()
        reader = _reader_of(header)
        if reader is None:
            raise TraceFormatError(f"{path}: line 1: no known trace format starts with {header[:80]!r}")
        for number, row in _numbered(reader, header, lines, path):
            if row.prompt_tokens < 1 or row.output_tokens < 0:
                raise TraceFormatError(f"{path}: line {number}: a request needs at least one prompt token")
            if row.time_s is not None and not math.isfinite(row.time_s):
                raise TraceFormatError(f"{path}: line {number}: a time must be finite")
            # Some published rows ask for no output; a server always answers with one token or none worth timing.
            rows.append(row if row.output_tokens else TraceRow(row.time_s, row.prompt_tokens, 1, row.prefix_hashes))
    return rows


def slo_set(name: str, unloaded_ttft_s: Callable[[int], float]) -> tuple[SloClass, ...]:
    """The classes of a named SLO set.

    Args:
        name: `A` (2 s / 100 ms), `B` (0.2 s + 5x unloaded TTFT / 50 ms), `C` (half 1 s / 50 ms, half 10 s / 200 ms),
            `B/<tbt_ms>` for B with another TBT objective, or `<ttft_ms>/<tbt_ms>` for one uniform objective.
        unloaded_ttft_s: TTFT of a prompt of that many tokens on an idle instance; used by `B`.

    Raises:
        ValueError: an unknown name or objectives that are not finite and above 0.
    """
    match name.upper():
        case "A":
            return (SloClass("A", 2.0, 0.1),)
        case "B":
            return (SloClass("B", 0.2, 0.05, per_unloaded_ttft=5.0, unloaded_ttft_s=unloaded_ttft_s),)
        case "C":
            return (SloClass("interactive", 1.0, 0.05, share=0.5), SloClass("relaxed", 10.0, 0.2, share=0.5))
    by_length = name.upper().startswith("B/")
    try:
        ttft_ms, tbt_ms = (float(part) for part in (f"200/{name[2:]}" if by_length else name).split("/"))
    except ValueError:
        raise ValueError(f"SLO set {name!r}: expected A, B, C, B/<tbt_ms> or <ttft_ms>/<tbt_ms>") from None
    if not all(0 < objective_ms < math.inf for objective_ms in (ttft_ms, tbt_ms)):
        raise ValueError(f"SLO set {name!r}: objectives must be finite and above 0")
    if by_length:
        return (SloClass(name, ttft_ms / 1e3, tbt_ms / 1e3, per_unloaded_ttft=5.0, unloaded_ttft_s=unloaded_ttft_s),)
    return (SloClass(name, ttft_ms / 1e3, tbt_ms / 1e3),)


def make_workload(
    trace: Sequence[TraceRow],
    *,
    arrivals: str,
    rate_rps: float,
    requests: int,
    classes: Sequence[SloClass],
    seed: int,
) -> list[WorkloadRequest]:
    """Build a reproducible workload; equal arguments give equal requests.

    Rows are drawn at random with replacement for `poisson` and `gamma`. For `trace` they are consecutive, from a
    seeded place on (around the end), so that bursts and the lengths in them stay together.

    Args:
        trace: rows to draw lengths from.
        arrivals: `poisson`, `gamma:<cv>` (coefficient of variation of the gaps) or `trace` (own timestamps).
        rate_rps: mean requests per second; the trace's own timestamps are stretched to it.
        requests: how many.
        classes: SLO classes, drawn by share.
        seed: of every draw; gaps and lengths at one seed are the same at every rate, only time is stretched.

    Raises:
        ValueError: unknown arrivals, a rate that is not finite and above 0, no requests, timestamps asked of a trace
            without.
    """
    if not 0 < rate_rps < math.inf:
        raise ValueError(f"the rate must be finite and above 0, got {rate_rps:g}")
    if requests < 1:
        raise ValueError(f"there must be at least 1 request, got {requests}")
    # Separate streams, so that what one draws never shifts another.
    rows_rng, gaps_rng, class_rng = (random.Random(f"{seed}:{stream}") for stream in ("rows", "gaps", "classes"))
    if arrivals == "trace":
        rows, times = _consecutive(trace, requests, rate_rps, rows_rng)
    else:
        rows = [rows_rng.choice(trace) for _ in range(requests)]
        times = _renewal_times(arrivals, requests, rate_rps, gaps_rng)
    chosen = class_rng.choices(classes, weights=[c.share for c in classes], k=requests)
    return [
        WorkloadRequest(
            request_id=f"r{index}",
            arrival_s=time_s,
            prompt_tokens=row.prompt_tokens,
            output_tokens=row.output_tokens,
            slo=slo_class.slo_of(row.prompt_tokens),
            slo_class=slo_class.name,
            prefix_hashes=row.prefix_hashes,
        )
        for index, (time_s, row, slo_class) in enumerate(zip(times, rows, chosen, strict=True))
    ]


def _renewal_times(arrivals: str, requests: int, rate_rps: float, rng: random.Random) -> list[float]:
    kind, _, parameter = arrivals.partition(":")
    if kind == "poisson" and not parameter:
        cv = 1.0
    elif kind == "gamma":
        try:
            cv = float(parameter)
        except ValueError:
            raise ValueError(f"arrivals {arrivals!r}: expected gamma:<cv>") from None
    else:
        raise ValueError(f"arrivals {arrivals!r}: expected poisson, gamma:<cv> or trace")
    if not 0 < cv < math.inf:
        raise ValueError(f"arrivals {arrivals!r}: cv must be finite and above 0")
    shape = 1 / cv**2
    times = []
    now_s = 0.0
    for _ in range(requests):
        now_s += rng.gammavariate(shape, 1 / shape) / rate_rps
        times.append(now_s)
    return times


def _consecutive(
    trace: Sequence[TraceRow], requests: int, rate_rps: float, rng: random.Random
) -> tuple[list[TraceRow], list[float]]:
    if any(row.time_s is None for row in trace):
        raise ValueError("arrivals 'trace': the trace has no timestamps")
    total = len(trace)
    times = [_time_of(row) for row in trace]
    mean_gap_s = times[-1] / max(total - 1, 1)
    if mean_gap_s <= 0:
        raise ValueError("arrivals 'trace': all timestamps are equal")
    period_s = times[-1] + mean_gap_s
    start = rng.randrange(total)
    # One factor for the whole trace, not for the part in use: a quiet part stays quiet and a burst stays a burst.
    stretch = 1 / (rate_rps * mean_gap_s)
    rows, out = [], []
    for offset in range(requests):
        lap, index = divmod(start + offset, total)
        rows.append(trace[index])
        out.append((times[index] + lap * period_s - times[start]) * stretch)
    return rows, out


def _time_of(row: TraceRow) -> float:
    assert row.time_s is not None
    return row.time_s


def _open_text(path: Path) -> io.TextIOWrapper:
    with path.open("rb") as probe:
        zipped = probe.read(2) == b"\x1f\x8b"
    if zipped:
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


Reader = Callable[[str, Iterable[str]], Iterator[TraceRow]]


def _numbered(reader: Reader, header: str, lines: Iterable[str], path: Path) -> Iterator[tuple[int, TraceRow]]:
    rows = reader(header, lines)
    number = 1
    while True:
        number += 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise TraceFormatError(f"{path}: row {number}: {error}") from error
        yield number, row


def _reader_of(header: str) -> Reader | None:
    if header.startswith("{"):
        return _mooncake
    columns = tuple(name.strip() for name in header.split(","))
    if {"t_s", "input_tokens", "output_tokens"} <= set(columns):
        return _csv_reader("t_s", "input_tokens", "output_tokens", float)
    if columns == ("TIMESTAMP", "ContextTokens", "GeneratedTokens"):
        return _csv_reader("TIMESTAMP", "ContextTokens", "GeneratedTokens", _azure_time)
    if {"Timestamp", "Request tokens", "Response tokens"} <= set(columns):
        return _csv_reader("Timestamp", "Request tokens", "Response tokens", float)
    if {"input_tokens", "output_tokens"} <= set(columns):
        return _csv_reader(None, "input_tokens", "output_tokens", float)
    return None


def _csv_reader(
    time_column: str | None, prompt_column: str, output_column: str, parse_time: Callable[[str], float]
) -> Reader:
    def read(header: str, lines: Iterable[str]) -> Iterator[TraceRow]:
        names = [name.strip() for name in header.split(",")]
        for row in csv.DictReader(lines, fieldnames=names):
            yield TraceRow(
                None if time_column is None else parse_time(row[time_column]),
                int(row[prompt_column]),
                int(row[output_column]),
            )

    return read


def _azure_time(text: str) -> float:
    """Seconds; the files have seven fractional digits, one more than `datetime` reads."""
    whole, _, fraction = text.partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{fraction or 0}")


def _mooncake(header: str, lines: Iterable[str]) -> Iterator[TraceRow]:
    for line in (header, *lines):
        if line.strip():
            row = json.loads(line)
            yield TraceRow(
                row["timestamp"] / 1e3,
                int(row["input_length"]),
                int(row["output_length"]),
                tuple(row.get("hash_ids", ())),
            )
