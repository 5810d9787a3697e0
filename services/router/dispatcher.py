"""The table of live requests: how they begin, where they are sent, where they go when a worker fails, how they end."""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from ascendra.v1 import cluster_pb2, common_pb2, worker_pb2
from services.common.errors import DeadlineExceeded, ResourceExhausted, ServiceError, Unavailable
from services.common.logging import get_logger
from services.common.wire import ROLE_TO_PROTO
from services.policy.kv_move import MoveMethod
from services.router import metrics
from services.router.admission import RETRY_MS, Admission
from services.router.config import RouterConfig
from services.router.contract import move_contract
from services.router.decision_log import DecisionLog
from services.router.history import History, explanation
from services.router.instance import Placed
from services.router.placer import Placer
from services.router.prediction import Predictions
from services.router.request import DecisionRecord, LiveRequest, State
from services.router.worker_link import WorkerLink

log = get_logger()

_LOOK_S = 1.0
"""How often requests that nobody has are looked for."""


@dataclass(slots=True)
class _Parked:
    request: LiveRequest
    since_s: float
    until_s: float


class Holder(Protocol):
    """Keeps new requests until a worker has room; see Binder."""

    def __len__(self) -> int:
        """Return how many requests are held."""

    def __contains__(self, request_id: str) -> bool:
        """Whether a request is held."""

    def backlog_tokens(self) -> int:
        """Return the prefill tokens that a newcomer waits for."""

    def hold(self, request: LiveRequest, why: str) -> None:
        """Keep a request that has not started anywhere."""

    def release(self, request_id: str) -> None:
        """Let go of a request that ended."""

    def on_steps(self, steps: Iterable[common_pb2.StepTelemetry]) -> None:
        """Take note that a worker moved on."""


class Dispatcher:
    """Owns every live request of this router."""

    def __init__(
        self,
        config: RouterConfig,
        predictions: Predictions,
        decision_log: DecisionLog,
        links: Callable[[], Iterable[WorkerLink]],
    ) -> None:
        self.config = config
        self.predictions = predictions
        self.links = links
        self.placer = Placer(config, predictions, links)
        self.history = History(config, decision_log)
        self.admission = Admission(config, self.placer, self.history, links)
        self.live: dict[str, LiveRequest] = {}
        self.work_changed: Callable[[], None] = lambda: None
        """Called when waiting requests should be looked at again."""
        self.binder: Holder | None = None
        """Takes new requests under late binding; moves are placed at once."""
        self._where: dict[str, tuple[WorkerLink, Placed]] = {}
        self._parked: dict[str, _Parked] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._next_look_s = 0.0
        self._idle = asyncio.Event()
        self._idle.set()

    # Requests in and out.

    def start(self, request: LiveRequest) -> None:
        """Take a request and place it.

        Raises:
            ServiceError: it was refused; nothing is left of it.
        """
        spec = request.spec
        now_s = time.monotonic()
        held, held_tokens = (len(self.binder), self.binder.backlog_tokens()) if self.binder is not None else (0, 0)
        self.admission.check(request, len(self.live), held, held_tokens, now_s)
        self.live[spec.request_id] = request
        self._idle.clear()
        metrics.LIVE.set(len(self.live))
        if spec.timeout_s > 0:
            delay_s = max(request.arrival_s + spec.timeout_s - now_s, 0.0)
            loop = asyncio.get_running_loop()
            self._timers[spec.request_id] = loop.call_later(delay_s, self._out_of_time, request)
        self.place(request, "place")

    def finish(self, request: LiveRequest, reason: "common_pb2.FinishReason", stop_token_id: int | None = None) -> None:
        """End a request with its last message."""
        text, finished = request.finish(reason, stop_token_id)
        request.sink.finished(text, finished)
        self._close(request, "finished")

    def cancel(self, request: LiveRequest, *, acknowledge: bool = False) -> None:
        """Give a request up because its client asked or is gone; the worker is told to abort it.

        Args:
            acknowledge: end its stream with FINISH_REASON_CANCELLED.
        """
        if request.ended:
            return
        self.stop_attempt(request)
        if acknowledge:
            text, finished = request.finish(common_pb2.FINISH_REASON_CANCELLED)
            request.sink.finished(text, finished)
        else:
            request.fail(State.FAILED)
            request.sink.abandoned()
        self._close(request, "cancelled")

    def fail(self, request: LiveRequest, error: ServiceError, state: State = State.FAILED) -> None:
        """End a request with a status; its worker is told to abort it."""
        if request.ended:
            return
        request.fail(state)
        self.stop_attempt(request)
        request.sink.failed(error)
        self._close(request, "refused" if state is State.REFUSED else error.reason.lower())

    def refuse(self, request: LiveRequest, why: str, retry_after_s: float) -> None:
        """End a request that was let in and asked to be refused in overload."""
        self.history.note(request, "refuse", why)
        delay_ms = round(retry_after_s * 1000)
        error = ResourceExhausted(why, reason="OVERLOADED", retry_safe=True, retry_after_ms=delay_ms)
        metrics.refused(error)
        self.fail(request, error, State.REFUSED)

    def fail_all(self, why: str) -> None:
        """End everything with a status that says whether a retry is safe."""
        for request in list(self.live.values()):
            self._lost(request, why, "DRAINING")

    async def idle(self) -> None:
        """Return when nothing is live."""
        await self._idle.wait()

    # What is known of them.

    def where(self, request: LiveRequest) -> tuple[WorkerLink, Placed] | None:
        """Return the present attempt of a request; None while it has none."""
        return self._where.get(request.spec.request_id)

    def explain(self, request_id: str) -> tuple[str, cluster_pb2.ExplainResponse] | None:
        """Return the tenant of a live or recently ended request, and the decisions about it."""
        request = self.live.get(request_id)
        if request is not None:
            return request.spec.tenant, explanation(request)
        return self.history.ended(request_id)

    def usable(self) -> list[worker_pb2.Welcome]:
        """Return what the attached workers said of themselves."""
        return [link.known for link in self.links() if link.attached]

    # Where they go.

    def place(self, request: LiveRequest, kind: str, rule: str = "", avoid: WorkerLink | None = None) -> None:
        """Send a request to the worker that the placement policy chooses, or park it while there is none.

        Args:
            kind: "place", "move" or whatever brought it here.
            rule: why, in front of the placement's own reason.
            avoid: a worker that just gave it up; used only when there is no other.
        """
        now_s = time.monotonic()
        if self.binder is not None and kind == "place" and not request.has_tokens:
            if any(link.takes_requests(now_s) for link in self.links()):
                self.binder.hold(request, rule or "late binding")
            else:
                self._park(request, now_s)
            return
        choice, link = self.placer.choose(request, now_s, avoid)
        if link is None:
            self._park(request, now_s)
            return
        reason = f"{rule}; {choice.rule}" if rule else choice.rule
        age_s = now_s - request.arrival_s
        candidates = self.placer.candidates(request, choice, age_s)
        self.submit(request, link, DecisionRecord(age_s, kind, reason, candidates=candidates))

    def submit(
        self,
        request: LiveRequest,
        link: WorkerLink,
        record: DecisionRecord,
        *,
        urgent: bool = False,
        ticketed: bool = False,
        relegated: bool = False,
        predicted: tuple[float, float] | None = None,
        kv_handle: bytes = b"",
    ) -> None:
        """Begin an attempt on a worker.

        Args:
            record: the decision that sends it there; its kind names the attempt.
            relegated: served behind all others there.
            predicted: remaining seconds to the first token there and seconds of queue ahead; None computes them.
            kv_handle: where the worker reads the KV cache of a stream that began elsewhere; empty: it computes it.
        """
        now_s = time.monotonic()
        if request.has_tokens:
            request.spec.weaken(*move_contract(request.spec.sampling, [link.known]))
        role = ROLE_TO_PROTO[link.instance.view.role]
        number = request.place(link.worker_id, role, f"{record.kind}: {record.rule}")
        # It may be expected there: its old worker failed it while it was asked back for a move.
        link.instance.expect_no_more(request.spec.request_id)
        queued = request.queued(urgent=urgent, ticketed=ticketed)
        queued.relegated = relegated
        if request.has_tokens:
            request.moved_by(MoveMethod.KV if kv_handle else MoveMethod.REPLAY)
        if kv_handle:
            queued.computed_tokens = queued.prompt_tokens - 1
        else:
            link.instance.view.expects(queued)
        handle = link.new_handle()
        placed = Placed(request, number, handle, queued, now_s, len(request.generated), now_s, by_kv=bool(kv_handle))
        placed.predicted_s, placed.queue_ahead_s = predicted or self.placer.predict(link, queued, now_s)
        p50_ratio, p90_ratio = self.predictions.stated_ratios(link.worker_id, placed.queue_ahead_s)
        placed.predicted_p50_s = placed.predicted_s * p50_ratio
        placed.predicted_p90_s = placed.predicted_s * p90_ratio
        record.to_worker_id = link.worker_id
        record.predicted_ttft_s = now_s - request.arrival_s + placed.predicted_s
        self.history.record(request, record)
        self._where[request.spec.request_id] = (link, placed)
        message = request.submission(handle, now_s, relegated=relegated, kv_handle=kv_handle)
        link.submit(placed, message)
        self.work_changed()

    def unplace(self, request: LiveRequest) -> None:
        """Take note that a worker handed a request back."""
        found = self._where.pop(request.spec.request_id, None)
        if found is not None:
            found[0].forget(found[1])
        request.fence()

    def detach(self, request: LiveRequest) -> None:
        """Take note that a request's attempt is over at its worker."""
        self._where.pop(request.spec.request_id, None)

    def stop_attempt(self, request: LiveRequest) -> None:
        """Abort a request's present attempt, if it has one; the request stays live."""
        found = self._where.pop(request.spec.request_id, None)
        if found is not None:
            link, placed = found
            link.cancel(placed)

    def abandon(self, request: LiveRequest, why: str) -> None:
        """Abort a request's present attempt and continue it elsewhere."""
        found = self._where.get(request.spec.request_id)
        if found is not None and not request.ended:
            self.stop_attempt(request)
            self.move(request, found[0], why, "abandoned")

    def move(self, request: LiveRequest, link: WorkerLink, why: str, cause: str) -> None:
        """Continue a request elsewhere after its worker gave it up; its old attempt is fenced already.

        Args:
            why: in words, for Explain.
            cause: in one word, for the metrics.
        """
        if request.ended:
            return
        request.moves += 1
        request.fence(cause)
        outcome = "moved"
        if request.has_tokens and request.spec.pinned:
            outcome = "pinned"
            self._lost(request, f"{why}; the request is pinned: {request.spec.contract_reason}", "PINNED")
        elif request.has_tokens and not self.config.move_running:
            outcome = "forbidden"
            self._lost(request, why, "WORKER_LOST")
        elif request.moves > self.config.max_moves:
            outcome = "too_many_moves"
            self._lost(request, f"{why}; attempt {request.moves} to fail", "TOO_MANY_MOVES")
        else:
            self.place(request, "move", why, avoid=link)
        if request.has_tokens:
            metrics.RUNNING_MOVES.labels(cause=cause, outcome=outcome).inc()

    def place_parked(self, why: str) -> None:
        """Place the requests that wait for a worker."""
        now_s = time.monotonic()
        for request_id, parked in list(self._parked.items()):
            if not any(link.takes_requests(now_s) for link in self.links()):
                break  # a circuit lets one through as a trial: the others wait on
            del self._parked[request_id]
            parked.request.parked_s += now_s - parked.since_s
            self.place(parked.request, "move" if parked.request.moves else "place", why)
        metrics.PARKED.set(len(self._parked))

    def expire_parked(self, now_s: float) -> None:
        """Fail requests that waited too long for a worker."""
        for parked in [p for p in self._parked.values() if p.until_s <= now_s]:
            waited = self.config.no_worker_wait_s
            error = Unavailable(
                f"no worker took requests for {waited:g} s",
                reason="NO_WORKER",
                retry_safe=not parked.request.has_tokens,
                retry_after_ms=1000,
            )
            self.fail(parked.request, error)

    def end_adrift(self, now_s: float) -> None:
        """Fail requests that nobody has: an error in this process lost them, and their clients must not wait for ever.

        Every message and timer leaves a live request on a worker, parked or held, so none is met here otherwise.
        """
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + _LOOK_S
        for request_id, request in list(self.live.items()):
            held = self.binder is not None and request_id in self.binder
            if not held and request_id not in self._where and request_id not in self._parked:
                log.error("request_adrift", request_id=request_id, tokens=len(request.generated))
                self._lost(request, "the router lost track of it", "ADRIFT")

    # How it is done.

    def _park(self, request: LiveRequest, now_s: float) -> None:
        left_s = max(self.config.no_worker_wait_s - request.parked_s, 0.0)
        self._parked[request.spec.request_id] = _Parked(request, now_s, now_s + left_s)
        metrics.PARKED.set(len(self._parked))
        self.history.note(request, "park", "no worker takes requests")

    def _lost(self, request: LiveRequest, message: str, reason: str) -> None:
        safe = not request.has_tokens
        self.fail(request, Unavailable(message, reason=reason, retry_safe=safe, retry_after_ms=RETRY_MS))

    def _out_of_time(self, request: LiveRequest) -> None:
        self._timers.pop(request.spec.request_id, None)
        limit_s = request.spec.timeout_s
        safe = not request.has_tokens
        self.fail(request, DeadlineExceeded(f"not finished within {limit_s:g} s", reason="TIMEOUT", retry_safe=safe))

    def _close(self, request: LiveRequest, outcome: str) -> None:
        request_id = request.spec.request_id
        self.live.pop(request_id, None)
        if self._parked.pop(request_id, None) is not None:
            metrics.PARKED.set(len(self._parked))
        if self.binder is not None:
            self.binder.release(request_id)
        timer = self._timers.pop(request_id, None)
        if timer is not None:
            timer.cancel()
        metrics.LIVE.set(len(self.live))
        if not self.live:
            self._idle.set()
        self.history.end(request, outcome)
        log.info(
            "request_ended",
            request_id=request_id,
            outcome=outcome,
            tokens=len(request.generated),
            attempts=len(request.attempts),
        )
