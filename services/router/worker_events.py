"""What workers say, carried to the requests: tokens, ends, refusals, losses."""

import time
from collections.abc import Sequence

from ascendra.v1 import common_pb2, predictor_pb2, worker_pb2
from services.common.errors import InvalidArgument, ResourceExhausted
from services.common.logging import get_logger
from services.common.wire import model_from_proto
from services.router import metrics
from services.router.dispatcher import Dispatcher
from services.router.instance import Placed
from services.router.mover import Mover
from services.router.rebalancer import Rebalancer
from services.router.request import Drop, LiveRequest
from services.router.worker_link import WorkerLink

log = get_logger()

_INVALID_ARGUMENT = 3
_NOT_ITS_FAULT = ("DRAINING", "QUEUE_FULL")
"""Reasons for which a worker hands a request back without having failed."""


class WorkerEvents:
    """Takes the events of all links."""

    def __init__(self, dispatcher: Dispatcher, rebalancer: Rebalancer, mover: Mover) -> None:
        self._dispatcher = dispatcher
        self._rebalancer = rebalancer
        self._mover = mover

    def on_up(self, link: WorkerLink) -> None:
        """Use a worker that attached, first of all for requests that wait for one."""
        assert link.welcome is not None
        twins = (other for other in self._dispatcher.links() if other is not link and other.attached)
        twin = next((other for other in twins if other.worker_id == link.worker_id), None)
        if twin is not None:
            link.refused_why = f"{twin.address} has the same worker id {link.worker_id!r}"
            log.error("worker_refused", address=link.address, why=link.refused_why)
            return
        model = None
        if link.welcome.HasField("step_time_model"):
            try:
                model = model_from_proto(link.welcome.step_time_model)
            except ValueError as error:
                log.warning("model_refused", worker_id=link.worker_id, why=str(error))
        self._dispatcher.predictions.worker_model(link.worker_id, model)
        self._dispatcher.place_parked("a worker came up")

    def on_down(self, link: WorkerLink, orphans: Sequence[Placed], why: str) -> None:
        """Move what was on a worker whose stream ended."""
        self._rebalancer.on_lost(link)
        self._mover.on_lost(link)
        for twin in self._dispatcher.links():
            if twin is not link and twin.refused_why and twin.worker_id == link.worker_id:
                twin.sever("its twin is gone")
        for placed in orphans:
            self._dispatcher.detach(placed.request)
        for placed in sorted(orphans, key=_urgency):
            self._dispatcher.move(placed.request, link, f"worker lost ({why})", link.lost_cause)
        self._dispatcher.work_changed()

    def on_step(self, link: WorkerLink, step: worker_pb2.StepOutput, now_s: float) -> None:
        """Hand tokens to their streams. Never waits; the cost per token counts here."""
        placed_by = link.placed
        token_ids = list(step.token_ids)
        ended = {end.handle: end for end in step.ended} if step.ended else {}
        # A busy worker merges steps: a request may appear more than once, and its end belongs to the last time.
        last_index = {handle: index for index, handle in enumerate(step.handles)} if ended else {}
        logprobs = _positions_by_handle(step) if step.logprobs else {}
        observe_gap = metrics.TBT.observe
        self._on_standing(link, step, now_s)
        position = 0
        for index, (handle, count) in enumerate(zip(step.handles, step.token_counts, strict=True)):
            chunk = token_ids[position : position + count]
            position += count
            positions = _take(logprobs, handle, count) if logprobs else ()
            placed = placed_by.get(handle)
            if placed is None:
                metrics.DROPPED_FRAMES.labels(reason=Drop.STALE_ATTEMPT).inc()
                continue
            request = placed.request
            end = ended.get(handle) if ended and last_index[handle] == index else None
            silent = end is not None and _is_silent(request, end)
            delta = request.tokens(placed.attempt, placed.next_offset, chunk, now_s, silent)
            if isinstance(delta, Drop):
                metrics.DROPPED_FRAMES.labels(reason=delta).inc()
                continue
            if not placed.delivered:
                self._first_token(link, placed, now_s)
            else:
                observe_gap(request.spec.slo_class, request.last_gap_s)
            placed.next_offset += count
            if not request.sink.tokens(delta.offset, delta.token_ids, delta.text, positions[: len(delta.token_ids)]):
                self._too_slow(request)
            elif delta.ended and end is None:
                self._end_here(request)
        for telemetry in step.telemetry:
            self._dispatcher.predictions.observe_step(link.worker_id, telemetry.prefill_tokens, telemetry.step_s)
        for end in step.ended:
            self._on_ended(link, end)
        if self._dispatcher.binder is not None:
            self._dispatcher.binder.on_steps(step.telemetry)
        metrics.TOKENS.inc(position)
        link.instance.count_tokens(position, now_s)
        if link.instance.has_queue:
            self._dispatcher.work_changed()

    def on_kv_exported(self, link: WorkerLink, exported: worker_pb2.KvExported) -> None:
        """Pass the answer on to who asked."""
        self._mover.on_exported(link, exported)

    def on_cancelled(self, link: WorkerLink, handles: Sequence[int]) -> None:
        """Let the sources of KV caches know that nobody reads them."""
        self._mover.on_let_go(link, handles)

    def on_withdrawn(self, link: WorkerLink, withdrawn: worker_pb2.Withdrawn) -> None:
        """Pass the answer on to who asked."""
        self._mover.on_let_go(link, withdrawn.withdrawn_handles)
        self._rebalancer.on_withdrawn(link, withdrawn)

    def on_failed(self, link: WorkerLink, failed: worker_pb2.RequestFailed) -> None:
        """Refuse, or try elsewhere, what a worker could not serve."""
        placed = link.placed.get(failed.handle)
        if placed is None:
            return
        request = placed.request
        self._mover.on_let_go(link, [failed.handle])
        self._dispatcher.detach(request)
        if failed.code != _INVALID_ARGUMENT and failed.reason not in _NOT_ITS_FAULT:
            link.breaker.failed(time.monotonic())  # before it is forgotten: it may be the trial of an open circuit
        link.forget(placed)
        if failed.code == _INVALID_ARGUMENT:
            self._dispatcher.fail(request, InvalidArgument(failed.message, reason=failed.reason or None))
            return
        cause = "drain" if failed.reason == "DRAINING" else "request_failed"
        self._dispatcher.move(request, link, f"{failed.reason or failed.code}: {failed.message}", cause)

    def on_draining(self, link: WorkerLink, remaining_s: float) -> None:
        """Let waiting requests leave a worker that drains; running ones move when it gives them up."""
        log.info("worker_draining", worker_id=link.worker_id, remaining_s=remaining_s)
        self._rebalancer.drain_waiting(link)

    def _first_token(self, link: WorkerLink, placed: Placed, now_s: float) -> None:
        """Take note of an attempt's first token."""
        request = placed.request
        placed.delivered = True
        request.parked_s = 0.0
        link.instance.first_token(placed)
        link.breaker.succeeded()
        if request.trace is not None:
            request.trace.first_token(request.ttft_s, placed.next_offset)
        if request.first_token_s == now_s:
            metrics.TTFT.observe(request.spec.slo_class, request.ttft_s)
        else:
            metrics.TBT.observe(request.spec.slo_class, request.last_gap_s)
        if moved_by := request.attempts[-1].moved_by:
            metrics.MOVE_SECONDS.labels(method=moved_by).observe(request.last_gap_s)
        self._mover.on_first_token(link, placed, now_s)
        if placed.by_kv:
            return  # says nothing of prefills
        self._dispatcher.predictions.report(
            predictor_pb2.Outcome(
                worker_id=link.worker_id,
                prompt_tokens=placed.queued.prompt_tokens,
                predicted_ttft_s=placed.predicted_s,
                predicted_ttft_p90_s=placed.predicted_p90_s,
                predicted_ttft_p50_s=placed.predicted_p50_s,
                relegated=placed.queued.relegated,
                actual_ttft_s=now_s - placed.submitted_s,
                queue_ahead_s=placed.queue_ahead_s,
            )
        )

    def _on_ended(self, link: WorkerLink, end: worker_pb2.RequestEnded) -> None:
        placed = link.placed.get(end.handle)
        if placed is None:
            return
        request = placed.request
        self._mover.on_let_go(link, [end.handle])
        self._dispatcher.detach(request)
        link.forget(placed)
        link.breaker.succeeded()
        if request.ended:
            return
        if not placed.by_kv:  # what was read from another worker is no hit of the prefix cache
            request.cached_prompt_tokens = max(request.cached_prompt_tokens, end.cached_prompt_tokens)
        stop_token_id = end.stop_token_id if end.HasField("stop_token_id") else None
        self._dispatcher.finish(request, end.reason, stop_token_id)

    def _end_here(self, request: LiveRequest) -> None:
        """End a request at a stop string or its token limit; its worker does not know yet."""
        self._dispatcher.stop_attempt(request)
        self._dispatcher.finish(request, common_pb2.FINISH_REASON_LENGTH)

    def _on_standing(self, link: WorkerLink, step: worker_pb2.StepOutput, now_s: float) -> None:
        for handle in step.kv_failed_handles:
            self._mover.on_kv_failed(link, handle)
        for handle in step.started_handles:
            placed = link.placed.get(handle)
            if placed is not None:
                placed.queued.started = True
                if placed.request.started(placed.attempt, now_s):
                    metrics.QUEUE_WAIT.observe(placed.request.spec.slo_class, placed.request.queue_wait_s)
        for handle in step.relegated_handles:
            placed = link.placed.get(handle)
            if placed is not None and not placed.queued.relegated:
                placed.queued.relegated = True
                placed.request.relegated = True
                self._dispatcher.history.note(
                    placed.request, "relegate", "its worker predicts that it cannot make it", link.worker_id
                )

    def _too_slow(self, request: LiveRequest) -> None:
        limit = self._dispatcher.config.max_unread_tokens
        error = ResourceExhausted(f"more than {limit} tokens were not read", reason="SLOW_READER")
        self._dispatcher.fail(request, error)


def _urgency(placed: Placed) -> tuple[bool, float]:
    """Streams first, then by the deadline of the next token."""
    queued = placed.request.queued()
    return not queued.continued, queued.deadline_s


def _is_silent(request: LiveRequest, end: worker_pb2.RequestEnded) -> bool:
    """Return whether the last token is a stop token whose text is not part of the completion."""
    return end.HasField("stop_token_id") and not request.spec.sampling.include_stop_in_output


def _positions_by_handle(step: worker_pb2.StepOutput) -> dict[int, list[common_pb2.PositionLogprobs]]:
    """Return the log-probabilities of each handle, in order: one that is behind has several entries in a message."""
    found: dict[int, list[common_pb2.PositionLogprobs]] = {}
    for entry in step.logprobs:
        found.setdefault(entry.handle, []).extend(entry.positions)
    return found


def _take(
    logprobs: dict[int, list[common_pb2.PositionLogprobs]], handle: int, count: int
) -> Sequence[common_pb2.PositionLogprobs]:
    """Remove and return those of the next tokens of a handle."""
    left = logprobs.get(handle)
    if left is None:
        return ()
    taken, logprobs[handle] = left[:count], left[count:]
    return taken
