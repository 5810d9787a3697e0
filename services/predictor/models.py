"""What is learned of each worker, in bounded memory. Time comes in with every call."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from services.policy.calibration import (
    SLICE_LIMITS_S,
    Accuracy,
    AccuracyWindow,
    Calibration,
    CalibrationPolicy,
    Confidence,
    DriftAlarm,
    ResidualSlice,
)
from services.policy.step_fit import OnlineStepTimeFit
from services.policy.step_time import StepShape, StepTimeModel

_FITTED_STEPS = 64
"""Steps after which a fit counts as more than its prior."""
_P90_SIGMAS = 1.2816
_POOLED = CalibrationPolicy(window=4096)
_POOLED_STEPS = 8192


@dataclass(slots=True)
class CardLine:
    """How well one kind of prediction of one worker does."""

    slice: str
    accuracy: Accuracy
    confidence: Confidence
    note: str


@dataclass(slots=True)
class Pool:
    """What all workers teach together.

    Ratios of actual to predicted TTFT are alike on all workers, for each is predicted by its own step times; one worker
    alone sees too few of them, the rare ones above all, to state a 90% bound.
    """

    calibration: Calibration = field(default_factory=lambda: Calibration(_POOLED))
    steps: AccuracyWindow = field(default_factory=lambda: AccuracyWindow(_POOLED_STEPS))


@dataclass(slots=True)
class WorkerModels:
    """Step-time fit of one worker, and how well its predictions do."""

    worker_id: str
    fit: OnlineStepTimeFit
    heard_s: float
    """When its last telemetry came."""
    pool: Pool
    incarnation: str = ""
    delivery_s: float = 0.0
    """Room that its token budget leaves in each gap, in seconds; 0: not said."""
    calibration: Calibration = field(default_factory=Calibration)
    """Of this worker alone: it judges, and demotes. The pool's residuals are the ones that are given out."""
    steps: AccuracyWindow = field(default_factory=AccuracyWindow)
    drift: DriftAlarm = field(default_factory=lambda: DriftAlarm("steps"))

    def observe(self, shape: StepShape, step_s: float) -> bool:
        """Judge the model by a step, then learn from it; False when it cannot be a step."""
        model = self.fit.model()
        if not self.fit.observe(shape, step_s):
            return False
        if self.fit.samples > _FITTED_STEPS:
            expected_s = model.step_s(shape)
            bound_s = expected_s * math.exp(_P90_SIGMAS * model.log_sigma)
            self.drift.judge(self.steps.judge(expected_s, step_s, bound_s))
            self.pool.steps.judge(expected_s, step_s, bound_s)
        return True

    @property
    def confidence(self) -> Confidence:
        """How far to trust the worker's model as a whole."""
        if self.drift.demoted or self.calibration.demoted:
            return Confidence.DEMOTED
        if self.fit.samples < _FITTED_STEPS:
            return Confidence.PRIOR
        return min(self.pool.calibration.confidence(index) for index in range(len(SLICE_LIMITS_S)))

    @property
    def residuals(self) -> tuple[ResidualSlice, ...]:
        """Quantiles of actual / predicted TTFT by load slice, to predict this worker with."""
        return self.pool.calibration.slices()

    def card(self) -> list[CardLine]:
        """Return the step-time line and one line a load slice."""
        step_state = Confidence.PRIOR if self.fit.samples < _FITTED_STEPS else Confidence.FITTED
        if self.drift.demoted:
            step_state = Confidence.DEMOTED
        steps = CardLine("steps", self.steps.accuracy(), step_state, self.drift.note or self.fit.note)
        return [steps, *_slice_lines(self.calibration)]


class ModelStore:
    """The models of all workers heard of lately."""

    def __init__(self, *, max_workers: int, forget_after_s: float, warm_start: StepTimeModel | None = None) -> None:
        self._max_workers = max_workers
        self._forget_after_s = forget_after_s
        self._warm_start = warm_start
        self._workers: dict[str, WorkerModels] = {}
        self.pool = Pool()
        self.version = 0
        """Rises with every change."""

    def __len__(self) -> int:
        return len(self._workers)

    def __iter__(self) -> Iterator[WorkerModels]:
        return iter(sorted(self._workers.values(), key=lambda models: models.worker_id))

    def get(self, worker_id: str) -> WorkerModels | None:
        """Return what is known of a worker."""
        return self._workers.get(worker_id)

    def heard(self, worker_id: str, incarnation: str, warm_start: StepTimeModel | None, now_s: float) -> WorkerModels:
        """Return the models of a worker that sent telemetry.

        A restarted engine begins anew: from its own warm start, else from what was learned of it before.
        """
        models = self._workers.get(worker_id)
        if models is None:
            self._make_room(now_s)
            fit = OnlineStepTimeFit(warm_start or self._warm_start)
            models = self._workers[worker_id] = WorkerModels(worker_id, fit, now_s, self.pool, incarnation)
        elif incarnation != models.incarnation:
            models.fit = OnlineStepTimeFit(warm_start or models.fit.model())
            models.incarnation = incarnation
        models.heard_s = now_s
        self.version += 1
        return models

    def learn_outcome(
        self,
        worker_id: str,
        queue_ahead_s: float,
        predicted_s: float,
        actual_s: float,
        stated_p90_s: float,
        stated_p50_s: float = 0.0,
    ) -> bool:
        """Calibrate by what became of a prediction; False when its worker is unknown or the numbers cannot be."""
        models = self._workers.get(worker_id)
        outcome = (queue_ahead_s, predicted_s, actual_s, stated_p90_s, stated_p50_s)
        if models is None or not models.calibration.learn(*outcome):
            return False
        self.pool.calibration.learn(*outcome)
        self.version += 1
        return True

    def card(self) -> list[CardLine]:
        """Return the lines of all workers together."""
        steps = self.pool.steps
        state = Confidence.FITTED if steps.samples else Confidence.PRIOR
        return [CardLine("steps", steps.accuracy(), state, ""), *_slice_lines(self.pool.calibration)]

    def forget_silent(self, now_s: float) -> list[str]:
        """Drop workers not heard of for too long and return their ids."""
        silent = [m.worker_id for m in self._workers.values() if now_s - m.heard_s > self._forget_after_s]
        for worker_id in silent:
            del self._workers[worker_id]
        self.version += bool(silent)
        return silent

    def _make_room(self, now_s: float) -> None:
        self.forget_silent(now_s)
        while len(self._workers) >= self._max_workers:
            del self._workers[min(self._workers.values(), key=lambda models: models.heard_s).worker_id]


def _slice_lines(calibration: Calibration) -> list[CardLine]:
    return [
        CardLine(name, calibration.accuracy(index), calibration.confidence(index), calibration.note)
        for index, (name, _) in enumerate(SLICE_LIMITS_S)
    ]
