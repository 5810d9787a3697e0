"""Moves running requests: with their KV cache where that is predicted to be faster than to compute it again.

A move with the KV cache: the source takes the request out, between two steps, and says where its cache can be read;
by then all its tokens were sent, and its attempt is over. The target is given the request with that handle. When it
has the cache (its first token), or will not read it any more, the source is told to free it. Every wait has a bound,
after which the request is computed again; what nobody frees goes when the source's lease is over.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ascendra.v1 import worker_pb2
from services.common.logging import get_logger
from services.policy.kv_move import MoveChoice, MoveMethod, TransferTime, choose_method, transfer_bound_s
from services.policy.state import QueuedRequest
from services.router import metrics
from services.router.breaker import Breaker
from services.router.dispatcher import Dispatcher
from services.router.instance import Placed
from services.router.request import DecisionRecord, LiveRequest
from services.router.worker_link import WorkerLink

log = get_logger()

_DRAINING_AT_ONCE = 8
"""Requests that leave a draining worker with their KV cache at the same time."""
_JUDGED_AGAIN_S = 1.0
_MAX_PAIRS = 10_000
_PAIR_REST_S = 10.0
"""A pair of workers between which a transfer failed is left alone this long; longer when it fails again."""


@dataclass(frozen=True, slots=True)
class MovePlan:
    """A move that could begin now, and what it is predicted to cost."""

    request: LiveRequest
    placed: Placed
    source: WorkerLink
    target: WorkerLink
    choice: MoveChoice
    kind: str = "move"
    """Of the decision, for Explain and the counters."""

    @property
    def cost_s(self) -> float:
        """Predicted seconds from now to the next token."""
        return self.choice.kv_s if self.choice.method is MoveMethod.KV else self.choice.replay_s


@dataclass(slots=True)
class _Pair:
    """What is known of transfers from one worker to another."""

    time: TransferTime
    breaker: Breaker = field(default_factory=lambda: Breaker(failures_to_open=1, open_s=_PAIR_REST_S))


@dataclass(slots=True)
class _Transfer:
    """A move with the KV cache under way."""

    plan: MovePlan
    why: str
    began_s: float
    expires_s: float
    reading: Placed | None = None
    """The attempt at the target, once the source has handed the request over."""
    abandoned: bool = False
    """The target was told to abort: until it has, it may still read."""


class Mover:
    """Moves running requests of one router."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._config = dispatcher.config
        self._exports: dict[tuple[str, int], _Transfer] = {}
        self._reads: dict[tuple[str, int], _Transfer] = {}
        self._pairs: dict[tuple[str, str], _Pair] = {}

    @property
    def busy(self) -> bool:
        """A move with a KV cache is under way."""
        return bool(self._exports or self._reads)

    # What may be called.

    def move(self, request: LiveRequest, why: str, target: WorkerLink | None = None) -> bool:
        """Move a running request to `target`, or to where placement wants it; False when it cannot move now."""
        plan = self.plan(request, target)
        if plan is None:
            return False
        self.start(plan, why)
        return True

    def plan(self, request: LiveRequest, target: WorkerLink | None = None, kind: str = "move") -> MovePlan | None:
        """Say where and how a request would move; None when it must not, or nobody else takes it."""
        found = self._dispatcher.where(request)
        if found is None or request.ended or not self._may_move(request, found[1]):
            return None
        source, placed = found
        now_s = time.monotonic()
        if target is None:
            _, target = self._dispatcher.placer.choose(request, now_s, avoid=source)
        if target is None or target is source or not target.takes_requests(now_s):
            return None
        replay_s, _ = self._dispatcher.placer.predict(target, request.queued(), now_s)
        excluded = self._no_transfer(source, target, placed, now_s)
        if excluded:
            choice = MoveChoice(MoveMethod.REPLAY, excluded, 0.0, replay_s)
        else:
            size = source.known.kv_transfer.bytes_per_token
            pair, policy = self._pair(source, target), self._config.kv_move_policy
            choice = choose_method(request.queued().prompt_tokens, size, pair.time, replay_s, policy)
        return MovePlan(request, placed, source, target, choice, kind)

    def start(self, plan: MovePlan, why: str) -> None:
        """Carry a plan out; to be called with a fresh one."""
        why = f"{why}; by {plan.choice.method}: {plan.choice.reason}"
        if plan.choice.method is MoveMethod.REPLAY:
            self._replay(plan, why)
            return
        now_s = time.monotonic()
        bound_s = transfer_bound_s(plan.choice.kv_s, self._config.kv_move_policy)
        plan.placed.moving = True
        plan.target.instance.expect(_loaded(plan.request))
        self._pair(plan.source, plan.target).breaker.sent()
        export_id = plan.source.export_kv(plan.placed)
        self._exports[plan.source.address, export_id] = _Transfer(plan, why, now_s, now_s + bound_s)

    async def run(self) -> None:
        """Give up what takes too long, and empty workers that drain, until cancelled."""
        while True:
            await asyncio.sleep(self._config.decide_interval_ms / 1000)
            now_s = time.monotonic()
            try:
                self._expire(now_s)
                self._drain(now_s)
            except Exception:
                log.exception("moves_failed")  # what was not moved stays where it is until the next round

    # What workers say.

    def on_exported(self, link: WorkerLink, exported: worker_pb2.KvExported) -> None:
        """Continue a request elsewhere with the KV cache that its worker keeps for it."""
        transfer = self._exports.pop((link.address, exported.export_id), None)
        if transfer is None:  # given up meanwhile
            if not exported.refused:
                link.release_kv(exported.handle)
            return
        plan = transfer.plan
        request, placed = plan.request, plan.placed
        plan.target.instance.expect_no_more(request.spec.request_id)
        found = self._dispatcher.where(request)
        here = not request.ended and found is not None and found[1] is placed
        if exported.refused:
            placed.moving = False
            self._undecided(transfer, "refused")
            if here:
                self._dispatcher.history.note(request, "move_refused", exported.refused, link.worker_id)
            return
        if not here:
            self._drop(transfer, exported.handle)
            return
        self._dispatcher.unplace(request)
        if placed.next_offset != exported.next_offset:
            log.error("kv_offset_differs", request_id=request.spec.request_id, worker_id=link.worker_id)
            self._drop(transfer, exported.handle)
            self._dispatcher.place(request, "move", "its tokens and its KV cache differ; by replay", avoid=link)
            return
        if not plan.target.takes_requests(time.monotonic()):
            self._drop(transfer, exported.handle)
            self._dispatcher.place(request, "move", f"{transfer.why}, but the target is gone; by replay", avoid=link)
            return
        request.moves += 1
        self._submit(plan, transfer.why, exported.kv_handle)
        taken = self._dispatcher.where(request)
        assert taken is not None
        transfer.reading = taken[1]
        self._reads[plan.target.address, taken[1].handle] = transfer

    def on_first_token(self, link: WorkerLink, placed: Placed, now_s: float) -> None:
        """Learn from a transfer that succeeded, and free the KV cache at the source."""
        transfer = self._reads.pop((link.address, placed.handle), None)
        if transfer is None:
            return
        plan = transfer.plan
        pair = self._pair(plan.source, plan.target)
        size = placed.queued.prompt_tokens * plan.source.known.kv_transfer.bytes_per_token
        pair.time.observe(size, now_s - transfer.began_s)
        pair.breaker.succeeded()
        metrics.KV_MOVES.labels(outcome="read").inc()
        plan.source.release_kv(plan.placed.handle)

    def on_kv_failed(self, link: WorkerLink, handle: int) -> None:
        """Take note that the target could not read the KV cache, and computes it."""
        transfer = self._reads.pop((link.address, handle), None)
        if transfer is None:
            return
        plan, placed = transfer.plan, transfer.reading
        plan.source.release_kv(plan.placed.handle)
        if placed is None or transfer.abandoned:
            return
        placed.by_kv = False
        placed.queued.computed_tokens = 0
        plan.request.moved_by(MoveMethod.REPLAY)
        self._failed(transfer, "failed", "its KV cache could not be read; by replay, where it is")

    def on_let_go(self, link: WorkerLink, handles: Sequence[int]) -> None:
        """Free the KV caches of attempts that their worker aborted, refused or ended."""
        for handle in handles:
            transfer = self._reads.pop((link.address, handle), None)
            if transfer is not None:
                if not transfer.abandoned:
                    self._undecided(transfer, "dropped")
                transfer.plan.source.release_kv(transfer.plan.placed.handle)

    def on_lost(self, link: WorkerLink) -> None:
        """Forget what a lost worker was asked for, or was reading: the dispatcher moves its requests.

        What it was reading is freed at the source by the lease: it may live and read on.
        """
        for key in [key for key in self._exports if key[0] == link.address]:
            transfer = self._exports.pop(key)
            transfer.plan.target.instance.expect_no_more(transfer.plan.request.spec.request_id)
            self._undecided(transfer, "lost")
        for key in [key for key in self._reads if key[0] == link.address]:
            self._undecided(self._reads.pop(key), "lost")

    # How it is done.

    def _may_move(self, request: LiveRequest, placed: Placed) -> bool:
        settled = not placed.moving and not placed.withdrawing
        allowed = self._config.move_running and not request.spec.pinned and request.moves < self._config.max_moves
        return settled and allowed and request.has_tokens

    def _no_transfer(self, source: WorkerLink, target: WorkerLink, placed: Placed, now_s: float) -> str:
        """Return why the KV cache cannot be handed over; empty when it can."""
        if not self._config.kv_moves:
            return "kv-moves is off"
        for link in (source, target):
            if not link.known.HasField("kv_transfer"):
                return f"{link.worker_id} hands no KV over"
        if source.known.kv_transfer.compatibility != target.known.kv_transfer.compatibility:
            return "the KV caches of the two workers differ"
        if not placed.delivered:
            return "its KV cache is not complete"
        if not self._pair(source, target).breaker.allows(now_s):
            return "a transfer between these workers failed a moment ago"
        return ""

    def _pair(self, source: WorkerLink, target: WorkerLink) -> _Pair:
        key = (source.address, target.address)
        pair = self._pairs.get(key)
        if pair is None:
            if len(self._pairs) >= _MAX_PAIRS:  # addresses of workers come and go
                del self._pairs[next(iter(self._pairs))]
            pair = self._pairs[key] = _Pair(TransferTime(self._config.kv_move_policy))
        return pair

    def _submit(self, plan: MovePlan, why: str, kv_handle: bytes = b"") -> None:
        request, target = plan.request, plan.target
        at_s = time.monotonic() - request.arrival_s
        record = DecisionRecord(at_s, plan.kind, why, from_worker_id=plan.source.worker_id)
        predicted = (plan.choice.kv_s, 0.0) if kv_handle else None
        self._dispatcher.submit(request, target, record, predicted=predicted, kv_handle=kv_handle)

    def _replay(self, plan: MovePlan, why: str) -> None:
        """Abort the present attempt and compute it again at the target, or where placement wants it."""
        request = plan.request
        self._dispatcher.stop_attempt(request)
        request.fence()
        request.moves += 1
        if plan.target.takes_requests(time.monotonic()):
            self._submit(plan, why)
        else:
            self._dispatcher.place(request, "move", why, avoid=plan.source)

    def _drop(self, transfer: _Transfer, handle: int) -> None:
        """Free a KV cache that nobody was told of."""
        self._undecided(transfer, "dropped")
        transfer.plan.source.release_kv(handle)

    def _undecided(self, transfer: _Transfer, outcome: str) -> None:
        """Count a transfer that says nothing of the pair of workers."""
        metrics.KV_MOVES.labels(outcome=outcome).inc()
        self._pair(transfer.plan.source, transfer.plan.target).breaker.trial_lost()

    def _failed(self, transfer: _Transfer, outcome: str, why: str) -> None:
        plan = transfer.plan
        metrics.KV_MOVES.labels(outcome=outcome).inc()
        self._pair(plan.source, plan.target).breaker.failed(time.monotonic())
        self._dispatcher.history.note(plan.request, "kv_failed", why, plan.source.worker_id)

    def _expire(self, now_s: float) -> None:
        """Compute again what was not handed over, or not read, within its bound."""
        for key in [key for key, transfer in self._exports.items() if transfer.expires_s <= now_s]:
            transfer = self._exports.pop(key)
            transfer.plan.target.instance.expect_no_more(transfer.plan.request.spec.request_id)
            self._give_up(transfer, transfer.plan.placed, "its worker did not hand its KV cache over in time")
        for key in [key for key, transfer in self._reads.items() if transfer.expires_s <= now_s]:
            transfer = self._reads[key]
            if transfer.abandoned:
                del self._reads[key]  # its worker does not answer: the source's lease frees the cache
                continue
            transfer.abandoned = True
            transfer.expires_s = now_s + self._config.cancel_timeout_s
            assert transfer.reading is not None
            self._give_up(transfer, transfer.reading, "its KV cache was not read in time")

    def _give_up(self, transfer: _Transfer, placed: Placed, why: str) -> None:
        found = self._dispatcher.where(transfer.plan.request)
        if transfer.plan.request.ended or found is None or found[1] is not placed:
            self._undecided(transfer, "dropped")
            return
        self._failed(transfer, "timeout", why)
        self._replay(transfer.plan, f"{why}; by replay")

    def _drain(self, now_s: float) -> None:
        """Let running requests leave workers that drain, if their KV cache goes with them; the others may end there."""
        for link in self._dispatcher.links():
            if not link.attached or not link.draining:
                continue
            room = _DRAINING_AT_ONCE - sum(placed.moving for placed in link.placed.values())
            for placed in list(link.placed.values()):
                if room <= 0:
                    break
                if not placed.delivered or placed.moving or now_s < placed.stays_until_s:
                    continue
                room -= 1
                plan = self.plan(placed.request)
                if plan is not None and plan.choice.method is MoveMethod.KV:
                    self.start(plan, "its worker drains")
                else:
                    placed.stays_until_s = now_s + _JUDGED_AGAIN_S


def _loaded(request: LiveRequest) -> QueuedRequest:
    """Return how a target sees a request that brings its KV cache: one token to compute."""
    queued = request.queued()
    queued.computed_tokens = queued.prompt_tokens - 1
    return queued
