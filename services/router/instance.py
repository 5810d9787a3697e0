"""One worker as the policies see it: telemetry, and this router's own requests from the moment they are sent."""

from collections import Counter, deque
from dataclasses import dataclass, replace

from ascendra.v1 import common_pb2, worker_pb2
from services.common.wire import ROLE_FROM_PROTO
from services.policy.delivery import is_allowance
from services.policy.liveness import RecentMaximum, stall_limit_s
from services.policy.prefix import PrefixIndex
from services.policy.state import InstanceView, QueuedRequest, Role
from services.policy.step_time import StepShape, StepTimeModel
from services.policy.telemetry import INTO_ENGINE_S, note_counted, see_step, share_out_progress
from services.policy.token_budget import DYNAMIC, STATIC, BudgetPolicy, least_gap_s
from services.router.request import PREFIX_BLOCK_TOKENS, LiveRequest

_RATE_WINDOW_S, _RATE_SLOT_S = 10.0, 1.0
_COMPILING_S = 60.0
"""An engine may do nothing for so long but compile a request's constraint."""


@dataclass(slots=True)
class Placed:
    """A request's present attempt on a worker."""

    request: LiveRequest
    attempt: int
    handle: int
    queued: QueuedRequest
    submitted_s: float
    next_offset: int
    """Absolute offset of the next token of this attempt."""
    decided_s: float
    """When it was last placed, moved, or refused a move."""
    withdrawing: bool = False
    moving: bool = False
    """Its worker was asked to hand it over with its KV cache."""
    stays_until_s: float = 0.0
    """Its worker drains, but its KV cache is not worth a transfer; judged again then."""
    by_kv: bool = False
    """It continues with a KV cache that is read from elsewhere."""
    delivered: bool = False
    """It has delivered a token."""
    predicted_s: float = 0.0
    """Remaining seconds to the first token predicted at submission."""
    predicted_p50_s: float = 0.0
    predicted_p90_s: float = 0.0
    queue_ahead_s: float = 0.0

    def prepares(self, now_s: float) -> bool:
        """Return whether no step may serve it yet: its KV cache is read, or its constraint is parsed and compiled."""
        if now_s - self.submitted_s < _COMPILING_S and self.request.spec.sampling.HasField("structured_output"):
            return True
        return self.by_kv


class Instance:
    """Keeps an InstanceView current. Times are seconds on the router's monotonic clock."""

    def __init__(self, address: str, model: StepTimeModel, budget: BudgetPolicy) -> None:
        """Start without knowing the worker.

        Args:
            model: step-time model until `refresh` brings a better one.
            budget: how its steps are sized, where the worker does not say.
        """
        self.view = InstanceView(worker_id="", role=Role.UNIFIED, model=model)
        self.address = address
        self.policy = worker_pb2.SchedulingPolicy()
        self._incarnation = ""
        """Of its engine: a new one has an empty prefix cache."""
        self.budget = self._default_budget = budget
        """How the worker sizes its steps."""
        self.last_message_s = 0.0
        self.steps = 0
        self.steps_changed_s = 0.0
        self.waiting = 0
        self.running = 0
        self.queued_prefill_tokens = 0
        self.kv_usage = 0.0
        self.round_trip_s = 0.0
        self.step_s = 0.0
        """Smoothed seconds of a step with prefill."""
        self._any_step_s = 0.0
        self._steps_seen = 0
        self._longest_step = RecentMaximum()
        self._step_began_s = 0.0
        """When the running step began, as seen from here: at the last report of a step's end."""
        self._queue: dict[int, Placed] = {}
        self._coming: dict[str, QueuedRequest] = {}
        self._decode_tbt_s: Counter[float] = Counter()
        self._tokens = 0
        self._windows: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=int(_RATE_WINDOW_S / _RATE_SLOT_S) + 1)

    def welcome(self, welcome: worker_pb2.Welcome, now_s: float) -> None:
        """Start afresh with what the worker says of itself."""
        view = self.view
        view.worker_id = welcome.worker_id
        view.role = ROLE_FROM_PROTO.get(welcome.role, Role.UNIFIED)
        view.max_num_seqs = welcome.max_num_seqs
        view.max_num_batched_tokens = welcome.max_num_batched_tokens
        view.kv_capacity_tokens = welcome.kv_capacity_tokens
        if not welcome.prefix_block_tokens:
            view.prefixes = None
        elif view.prefixes is None or welcome.incarnation != self._incarnation:
            view.prefixes = PrefixIndex(PREFIX_BLOCK_TOKENS, view.kv_capacity_tokens)
        self._incarnation = welcome.incarnation
        view.draining = welcome.draining
        self.adopt(welcome.policy)
        self._queue.clear()
        self._decode_tbt_s.clear()
        view.decodes = view.decode_context_tokens = 0
        self.waiting = self.running = self.queued_prefill_tokens = self.steps = 0
        self._steps_seen = 0
        self.last_message_s = self.steps_changed_s = now_s

    def adopt(self, policy: worker_pb2.SchedulingPolicy, static_tokens: int = 0) -> None:
        """Take over the policies that the worker says are in force.

        Args:
            static_tokens: size of its steps under a static budget; 0: not seen yet.
        """
        self.policy = policy
        default = self._default_budget
        kind = policy.token_budget if policy.token_budget in (STATIC, DYNAMIC) else default.kind
        most = max(self.view.max_num_batched_tokens, 1)
        static_tokens = min(static_tokens or default.static_tokens, most)
        max_tokens = min(default.max_tokens, most)
        self.budget = replace(
            self.budget,
            kind=kind,
            static_tokens=static_tokens,
            max_tokens=max_tokens,
            calm_factor=policy.calm_factor,
        )

    def telemetry(self, step: common_pb2.StepTelemetry, now_s: float) -> None:
        """Take in one engine step."""
        if step.step != self.steps:
            self.steps, self.steps_changed_s = step.step, now_s
        self._step_began_s = now_s - step.age_s
        sent = ((placed.queued, placed.submitted_s) for placed in self._queue.values())
        note_counted(sent, self._step_began_s - step.step_s, self.round_trip_s)
        self._steps_seen += 1
        self._longest_step.observe(step.step_s, now_s)
        self.waiting, self.running = step.waiting, step.running
        self.queued_prefill_tokens = step.queued_prefill_tokens
        self.kv_usage = step.kv_usage
        if self.budget.kind == STATIC and step.token_budget not in (0, self.budget.static_tokens):
            self.adopt(self.policy, step.token_budget)
        if step.delivery_s != self.budget.delivery_s and is_allowance(step.delivery_s):
            self.budget = replace(self.budget, delivery_s=step.delivery_s)
        self.view.decodes = step.decodes
        self.view.decode_context_tokens = step.decode_context_tokens
        self._any_step_s += 0.2 * (step.step_s - self._any_step_s) if self._any_step_s else step.step_s
        if step.prefill_tokens:
            self.step_s += 0.2 * (step.step_s - self.step_s) if self.step_s else step.step_s

    def heartbeat(self, beat: worker_pb2.Heartbeat, now_s: float) -> None:
        """Take in that nothing happened."""
        if beat.steps != self.steps or not (beat.waiting or beat.running or self._queue):
            self.steps, self.steps_changed_s = beat.steps, now_s
        self.waiting, self.running, self.kv_usage = beat.waiting, beat.running, beat.kv_usage
        if not beat.running:
            self.view.decodes = self.view.decode_context_tokens = 0
            if not beat.waiting:
                self.queued_prefill_tokens = 0

    @property
    def delivery_s(self) -> float:
        """Room that its steps leave in each gap, as it says; 0 under a static budget and before its first step."""
        return self.budget.delivery_s if self.budget.kind == DYNAMIC and self._steps_seen else 0.0

    @property
    def observed_step_s(self) -> float:
        """Smoothed seconds of its last steps; 0 while it is idle."""
        return self._any_step_s if self.running else 0.0

    def stall_limit_s(self, now_s: float, stall_s: float, unknown_s: float) -> float:
        """Return how long its steps may stand still with work queued: longer than a step in progress may take.

        An engine that says it is idle may not have got what was sent to it.
        """
        if not (self.running or self.waiting):
            return max(stall_s, unknown_s)
        view = self.view
        longest = StepShape(view.max_num_batched_tokens, view.decodes, view.decode_context_tokens)
        predicted_s = view.model.step_s(longest)
        return stall_limit_s(stall_s, unknown_s, self._steps_seen, predicted_s, self._longest_step.value(now_s))

    def stalled(self, now_s: float, stall_s: float) -> bool:
        """Return whether steps have stood still that long although there is work; to be asked again and again."""
        if not self.running:
            preparing = sum(placed.prepares(now_s) for placed in self._queue.values())
            if max(self.waiting, len(self._queue)) <= preparing:
                self.steps_changed_s = now_s  # nobody can be served: it stalls only from here on
        return now_s - self.steps_changed_s > stall_s

    def submitted(self, placed: Placed) -> None:
        """Count a request that was just sent."""
        if not self._queue and not self.running:
            self.steps_changed_s = placed.submitted_s  # an idle engine takes no steps: it stalls only from here on
        self._queue[placed.handle] = placed
        self.view.receives(placed.queued)

    def first_token(self, placed: Placed) -> None:
        """Move a request from the queue to the decodes."""
        if self._queue.pop(placed.handle, None) is not None:
            self._decode_tbt_s[placed.request.spec.slo.tbt_s] += 1
            self.view.receives(placed.queued)

    def gone(self, placed: Placed) -> None:
        """Forget a request, wherever it was."""
        if self._queue.pop(placed.handle, None) is not None:
            if not placed.queued.started:
                self.view.returns(placed.queued)
            return
        if self.view.prefixes is not None:
            self.view.prefixes.add(*placed.request.history_blocks())
        tbt_s = placed.request.spec.slo.tbt_s
        if self._decode_tbt_s[tbt_s] <= 1:
            del self._decode_tbt_s[tbt_s]
        else:
            self._decode_tbt_s[tbt_s] -= 1

    def expect(self, queued: QueuedRequest) -> None:
        """Count a request that is about to be moved here."""
        self.view.expects(queued)
        self._coming[queued.request_id] = queued

    def expect_no_more(self, request_id: str) -> None:
        """Stop counting a move: it arrived or will not happen."""
        self._coming.pop(request_id, None)

    @property
    def has_queue(self) -> bool:
        """Some request of this router has no token here yet."""
        return bool(self._queue)

    @property
    def queue(self) -> list[Placed]:
        """This router's requests here that have no token of this attempt yet."""
        return list(self._queue.values())

    def count_tokens(self, tokens: int, now_s: float) -> None:
        """Add delivered tokens to the rate."""
        if now_s - self._windows[-1][0] >= _RATE_SLOT_S:
            self._windows.append((now_s, self._tokens))
        self._tokens += tokens

    def rate(self, now_s: float) -> float:
        """Return tokens per second to this router over the last ten seconds or so."""
        since_s, before = next((w for w in self._windows if w[0] >= now_s - _RATE_WINDOW_S), (now_s, self._tokens))
        return (self._tokens - before) / max(now_s - since_s, _RATE_SLOT_S)

    def glance(self, now_s: float) -> InstanceView:
        """Return the view with no more than its age brought up to date: enough to leave it aside."""
        self.view.report_age_s = now_s - self.last_message_s
        return self.view

    def refresh(self, model: StepTimeModel, now_s: float) -> InstanceView:
        """Bring the view up to date and return it."""
        view = self.glance(now_s)
        view.model = model
        view.hop_s = self.round_trip_s + INTO_ENGINE_S
        least_s = least_gap_s(model)
        view.min_tbt_s = min((tbt_s for tbt_s in self._decode_tbt_s if tbt_s > least_s), default=0.0)
        view.kv_used_tokens = int(self.kv_usage * view.kv_capacity_tokens)
        sent = [placed.queued for placed in self._queue.values()]
        first_sent_s = next((placed.submitted_s for placed in self._queue.values()), 0.0)
        others = share_out_progress(sent, self.queued_prefill_tokens, now_s)
        view.queue = [*sent, *([others] if others else ()), *self._coming.values()]
        see_step(
            view,
            now_s,
            busy=self.running > 0 or self.waiting > 0,
            began_s=self._step_began_s,
            queued_tokens=self.queued_prefill_tokens,
            sent=sent,
            first_sent_s=first_sent_s,
        )
        return view
