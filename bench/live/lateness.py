"""How a machine scatters what a model knows exactly: steps against their profile, tokens against the ends of steps.

Emulated steps take what their profile says, times jitter; what they take beyond it, and how long a step's tokens are on
their way to the client, is the machine's. The simulator is told both as distributions (`bench.fidelity`). All times are
on the monotonic clock of one machine.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.metrics import RequestRecord
from bench.simulator.scatter import Scatter
from services.policy.step_time import StepShape, StepTimeModel

Times = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Lateness:
    """What the machine adds in one run."""

    decode_excess: Scatter
    """Seconds that a step without prefill took beyond the profile, jitter included."""
    prefill_excess: Scatter
    """The same of steps with prefill."""
    delivery: Scatter
    """Seconds from a step's end to its tokens' arrival at the client."""

    def as_dict(self) -> dict[str, Any]:
        """Return it for a result file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Lateness":
        """Read what `as_dict` returned. Raises KeyError, ValueError."""
        kept = {field.name: data[field.name] for field in fields(cls)}
        return cls(**{name: Scatter(tuple(one["quantiles_s"]), one["correlation"]) for name, one in kept.items()})


def lateness(
    step_logs: Mapping[str, Path],
    profile: StepTimeModel,
    records: Iterable[RequestRecord],
    homes: Mapping[str, str],
) -> Lateness:
    """Compare what workers and client noted of a run.

    Args:
        step_logs: the workers' step logs, by worker id.
        homes: by request id the worker that generated all tokens of the request.

    Raises:
        OSError: a log cannot be read.
        ValueError: too little was noted.
    """
    steps = {worker_id: read_steps(path) for worker_id, path in step_logs.items()}
    excess: dict[bool, list[list[float]]] = {False: [], True: []}
    for rows in steps.values():
        for prefills, series in excess.items():
            series.append(
                [row["step_s"] - profile.step_s(_shape(row)) for row in rows if bool(row["prefill_tokens"]) is prefills]
            )
    ends_s = {worker_id: np.array([row["ended_s"] for row in rows]) for worker_id, rows in steps.items()}
    delays_s: dict[str, dict[int, list[float]]] = {worker_id: defaultdict(list) for worker_id in steps}
    for record in records:
        home = homes.get(record.request_id)
        if home is None or not record.token_times_s:
            continue
        times_s = np.array(record.token_times_s)
        first = first_step(ends_s[home], times_s)
        if first is None:
            continue
        delays = times_s - ends_s[home][first : first + len(times_s)]
        for place, delay_s in enumerate(delays.tolist(), first):
            delays_s[home][place].append(delay_s)
    deliveries = [[float(np.median(by_step[place])) for place in sorted(by_step)] for by_step in delays_s.values()]
    return Lateness(Scatter.of(excess[False]), Scatter.of(excess[True]), Scatter.of(deliveries))


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Read a worker's step log; an unfinished last line is left out. Raises OSError, ValueError."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def first_step(ends_s: Times, times_s: Times) -> int | None:
    """Return the step that made a request's first token, given when all steps ended and its tokens arrived.

    A stream has a token of every step, and none before the step's end: the latest step for which that holds. None where
    it holds for no step.
    """
    count = len(times_s)
    # The k-th token needs k steps before it: the last end that is not after any of the arrivals.
    latest = np.searchsorted(ends_s, times_s, side="right") - 1 - np.arange(count)
    first = int(latest.min(initial=len(ends_s) - count))
    return first if first >= 0 else None


def _shape(row: Mapping[str, Any]) -> StepShape:
    return StepShape(
        row["prefill_tokens"], row["decodes"], row["decode_context_tokens"], row["prefill_context_products"]
    )
