"""Latency of tokens against the metronome's steps."""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]

EARLY_S = 0.004
"""A client may see a step's token this much before the metronome does: both wait for the same two cores."""


def token_latencies_s(times: Floats, steps: Floats, first_token: int = 0) -> Floats:
    """Return the latency of each token of one stream, from its step's message at the metronome.

    Every step decodes one token of every stream, so token k belongs to step j + k for one j: the latest that makes no
    token arrive (more than EARLY_S) before its step. A late stream cannot hide by being read against a later step
    unless all its tokens are late by a step or more; the delivered share tells that case apart.

    Args:
        times: arrivals of consecutive tokens.
        steps: arrivals of consecutive steps at the metronome.
        first_token: index of times[0], to skip a start in which tokens and steps are not yet one to one.
    """
    times = times[first_token:]
    candidates = len(steps) - len(times) + 1
    low, high = 0, candidates - 1
    best = -1
    while low <= high:  # lateness falls as j grows, so the latest feasible j is found by bisection
        middle = (low + high) // 2
        if float(np.min(times - steps[middle : middle + len(times)])) >= -EARLY_S:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    if best < 0:
        return np.empty(0)
    aligned: Floats = times - steps[best : best + len(times)]
    return aligned


def window(times: Floats, from_s: float, until_s: float) -> Floats:
    """Return the arrivals within a span of time."""
    return times[(times >= from_s) & (times < until_s)]
