"""When an instance that says nothing, or does nothing, is given up. Times are seconds."""

import math

_MISSED_HEARTBEATS = 3
"""Fewer missed heartbeats than this mean nothing."""
_LATENESS_FACTOR = 2.0
_WINDOW_S = 15.0
_LONGEST_FACTOR = 4.0
"""However late its messages come, silence is never borne longer than so many times what was asked for."""
_STEP_FACTOR = 4.0
"""A step is not stalled before it took so many times what is predicted, or what any lately took."""
_FEWEST_STEPS = 32
"""Steps before the pace of an engine is known: the first ones compile, allocate and load."""


class RecentMaximum:
    """The largest value of the last `_WINDOW_S` at least, and of three times that at most."""

    __slots__ = ("_before", "_began_s", "_now")

    def __init__(self) -> None:
        self._before = self._now = 0.0
        self._began_s = -math.inf

    def observe(self, value: float, now_s: float) -> None:
        """Take in a value."""
        self._turn(now_s)
        if value > self._now:
            self._now = value

    def value(self, now_s: float) -> float:
        """Return the largest; 0 when there was none."""
        self._turn(now_s)
        return max(self._before, self._now)

    def _turn(self, now_s: float) -> None:
        if now_s - self._began_s >= _WINDOW_S:
            self._before = self._now if now_s - self._began_s < 2 * _WINDOW_S else 0.0
            self._now, self._began_s = 0.0, now_s


class SilenceDetector:
    """How long an instance may be silent: what was asked for, and longer while its messages come late anyway.

    A heartbeat comes from the event loop of the instance's front end, whatever its engine does. On a machine that is
    starved of processors heartbeats come late before they stay away; that lateness is allowed for.
    """

    __slots__ = ("_heard_s", "_heartbeat_s", "_lateness", "_silence_s")

    def __init__(self, silence_s: float, heartbeat_s: float, now_s: float) -> None:
        """Start listening.

        Args:
            silence_s: silence that is suspect.
            heartbeat_s: longest time between two messages of a healthy instance.
        """
        self._silence_s = max(silence_s, _MISSED_HEARTBEATS * heartbeat_s)
        self._heartbeat_s = heartbeat_s
        self._heard_s = now_s
        self._lateness = RecentMaximum()

    def heard(self, now_s: float) -> None:
        """Take note of a message."""
        late_s = now_s - self._heard_s - self._heartbeat_s
        if late_s > 0:
            self._lateness.observe(late_s, now_s)
        self._heard_s = now_s

    def limit_s(self, now_s: float) -> float:
        """Return how long it may be silent now."""
        allowed_s = self._silence_s + _LATENESS_FACTOR * self._lateness.value(now_s)
        return min(allowed_s, _LONGEST_FACTOR * self._silence_s)

    def silent(self, now_s: float) -> bool:
        """Return whether it has been silent for too long."""
        return now_s - self._heard_s > self.limit_s(now_s)


def stall_limit_s(stall_s: float, unknown_s: float, steps: int, predicted_s: float, longest_s: float) -> float:
    """Return how long an engine's steps may stand still with work queued: a step in progress is no stall.

    Args:
        stall_s: standstill that is suspect when steps are short.
        unknown_s: standstill that is suspect while the engine's pace is unknown.
        steps: steps seen.
        predicted_s: the longest step that it may be in, as predicted.
        longest_s: the longest step that it lately took.
    """
    if steps < _FEWEST_STEPS:
        return max(unknown_s, stall_s)
    return max(stall_s, _STEP_FACTOR * max(predicted_s, longest_s))
