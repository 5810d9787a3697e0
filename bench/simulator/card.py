"""How well TTFTs are predicted in virtual time, where nothing is uncertain but step times and what comes later."""

from typing import Any

from bench.simulator.request import SimRequest
from bench.simulator.view import RoutedRequest, WorkerState
from services.policy.calibration import SLICE_LIMITS_S, Calibration, CalibrationPolicy
from services.policy.order import OrderPolicy
from services.router.estimates import newcomer_in_order


class PredictionCard:
    """Judges the prediction with which each request was sent, as the predictor does with what routers report."""

    def __init__(self) -> None:
        self.relegated = 0
        """Not judged: given up after they were sent."""
        self._calibration = Calibration(CalibrationPolicy(window=4096))
        self._sent: dict[str, tuple[float, float, float]] = {}

    def sends(self, state: WorkerState, request: RoutedRequest, order: OrderPolicy, now_s: float) -> None:
        """Predict a request that is about to be sent to a worker."""
        state.running(now_s)
        estimate = newcomer_in_order(state.view, request, now_s, order, state.budget)
        self._sent[request.request_id] = now_s, estimate.mean_s, estimate.wait_s

    def first_token(self, request: SimRequest, now_s: float) -> None:
        """Judge the prediction for where a request was sent last."""
        sent_s, predicted_s, ahead_s = self._sent.pop(request.request_id, (now_s, 0.0, 0.0))
        if request.was_relegated:
            self.relegated += 1
        elif now_s > sent_s:
            self._calibration.learn(ahead_s, predicted_s, now_s - sent_s)

    def lines(self) -> list[dict[str, Any]]:
        """Return the figures of each slice that saw requests, as the predictor's card has them."""
        accuracies = ((name, self._calibration.accuracy(index)) for index, (name, _) in enumerate(SLICE_LIMITS_S))
        return [
            {
                "worker_id": "",
                "slice": name,
                "samples": found.samples,
                "median_ape": found.median_ape,
                "p90_ape": found.p90_ape,
                "mape": found.mape,
                "bias": found.bias,
                "coverage_p90": found.coverage_p90,
            }
            for name, found in accuracies
            if found.samples
        ]
