"""The worker's state across its routers: live requests, role, drain, and the death of the engine."""

import asyncio
import itertools
import secrets
import time
from collections.abc import Iterable

import grpc

from ascendra.v1 import common_pb2, worker_pb2
from services.common import span_names
from services.common.logging import get_logger
from services.common.tracing import Tracer
from services.common.wire import ROLE_FROM_PROTO, ROLE_TO_PROTO
from services.policy.delivery import is_allowance
from services.worker import metrics
from services.worker.config import WorkerConfig
from services.worker.engine.contract import Engine, EngineDead, KvTransferInfo, StepReport
from services.worker.outbox import Outbox
from services.worker.tracing import AttemptTrace

log = get_logger()

PROTOCOL_VERSION = 1
UNAVAILABLE: int = grpc.StatusCode.UNAVAILABLE.value[0]
_CLEAN_UP_S = 10.0
_DELIVERY_STEP_S = 0.0005
"""Smaller changes of the routers' gap inflation are not passed on to the engine."""


class LiveRequest:
    """A request in the engine."""

    __slots__ = (
        "_progress", "delivered_tokens", "engine_id", "first_offset", "handle", "outbox", "preemptions", "request_id",
        "task", "trace",
    )  # fmt: skip

    def __init__(self, handle: int, request_id: str, engine_id: str, outbox: Outbox, first_offset: int = 0) -> None:
        """Start with nothing delivered.

        Args:
            first_offset: of its first token here, in the completion.
        """
        self.handle = handle
        self.request_id = request_id
        self.engine_id = engine_id
        self.outbox = outbox
        self.first_offset = first_offset
        self.preemptions = 0
        self.delivered_tokens = 0
        self.task: asyncio.Task[None] | None = None
        self.trace: AttemptTrace | None = None
        """Its span; None while tracing is off."""
        self._progress: asyncio.Event | None = None

    def delivered(self, tokens: int) -> None:
        """Count tokens that went to the router's outbox."""
        self.delivered_tokens += tokens
        if self._progress is not None:
            self._progress.set()

    async def until_delivered(self, tokens: int) -> None:
        """Return when so many tokens went to the router's outbox."""
        self._progress = asyncio.Event()
        while self.delivered_tokens < tokens:
            self._progress.clear()
            await self._progress.wait()


class Worker:
    """What all attached routers share."""

    def __init__(self, config: WorkerConfig, engine: Engine, tracer: Tracer | None = None) -> None:
        self.config = config
        self.tracer = tracer
        self.engine = engine
        self.worker_id = config.effective_worker_id
        self.incarnation = secrets.token_hex(8)
        self.role = config.role
        self.live: dict[str, LiveRequest] = {}
        self.outboxes: set[Outbox] = set()
        self.steps = 0
        self.last_step: common_pb2.StepTelemetry | None = None
        self.engine_died = asyncio.Event()
        self.drain_deadline_s: float | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._numbers = itertools.count(1)
        self._held_kv: dict[str, asyncio.TimerHandle] = {}
        self._drain: asyncio.Task[None] | None = None
        self.drain_begun = asyncio.Event()
        self._deliveries_s: dict[str, float] = {}
        self._applied_delivery_s = 0.0
        engine.on_report(self._on_report)
        metrics.INFO.facts = self.facts

    @property
    def draining(self) -> bool:
        """No new requests are taken."""
        return self.drain_deadline_s is not None

    @property
    def ready(self) -> bool:
        """New requests are taken."""
        return not self.draining and not self.engine_died.is_set()

    def policy(self) -> worker_pb2.SchedulingPolicy:
        """Return the policies in force."""
        if not self.engine.info.policies:
            return worker_pb2.SchedulingPolicy(value_function="edf", token_budget="static", relegation="none")
        config = self.config
        return worker_pb2.SchedulingPolicy(
            value_function=config.value_function,
            token_budget=config.token_budget,
            relegation=config.relegation,
            calm_factor=config.calm_factor,
        )

    def facts(self) -> dict[str, str]:
        """Return what the worker is, for metrics and traces."""
        info = self.engine.info
        return {
            "worker": self.worker_id,
            "role": self.role.value,
            "model_name": self.config.effective_model_name,
            "engine_kind": info.engine,
            "vllm_version": info.version,
        }

    async def welcome(self) -> worker_pb2.Welcome:
        """Describe the worker to a router."""
        info = self.engine.info
        return worker_pb2.Welcome(
            worker_id=self.worker_id,
            protocol_version=PROTOCOL_VERSION,
            role=ROLE_TO_PROTO[self.role],
            model=self.config.effective_model_name,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            kv_capacity_tokens=info.kv_capacity_tokens,
            engine=info.engine,
            engine_version=info.version,
            incarnation=self.incarnation,
            step_time_model=await self.engine.step_time_model(),
            heartbeat_ms=self.config.heartbeat_ms,
            policy=self.policy(),
            draining=self.draining,
            continuation=worker_pb2.Continuation(
                keyed_noise=info.keyed_noise, carried_penalties=info.carried_penalties, dtype=info.dtype
            ),
            kv_transfer=_kv_transfer(info.kv_transfer),
            prefix_block_tokens=info.prefix_block_tokens,
        )

    def heartbeat(self) -> worker_pb2.Heartbeat:
        """Say how the engine is."""
        last = self.last_step
        if last is None:
            return worker_pb2.Heartbeat(steps=self.steps, waiting=len(self.live))
        return worker_pb2.Heartbeat(
            steps=self.steps, waiting=last.waiting, running=last.running, kv_usage=last.kv_usage
        )

    def add(self, handle: int, request_id: str, outbox: Outbox, first_offset: int = 0) -> LiveRequest:
        """Register a request under a new engine id."""
        live = LiveRequest(handle, request_id, f"r{next(self._numbers)}", outbox, first_offset)
        self.live[live.engine_id] = live
        self._idle.clear()
        metrics.LIVE.set(len(self.live))
        return live

    def remove(self, live: LiveRequest) -> None:
        """Forget a request."""
        self.live.pop(live.engine_id, None)
        if live.trace is not None:
            live.trace.ends()
        metrics.LIVE.set(len(self.live))
        self._note_idle()

    def hold_kv(self, engine_id: str, lease_s: float) -> None:
        """Stay until the KV of an exported request was read, or its lease is over."""
        loop = asyncio.get_running_loop()
        self._held_kv[engine_id] = loop.call_later(lease_s, self._let_go_of_kv, engine_id)
        self._idle.clear()

    async def release_kv(self, engine_ids: Iterable[str]) -> None:
        """Free the KV of exported requests."""
        ids = list(engine_ids)
        await self.engine.release_kv(ids)
        for engine_id in ids:
            self._let_go_of_kv(engine_id)

    def _let_go_of_kv(self, engine_id: str) -> None:
        timer = self._held_kv.pop(engine_id, None)
        if timer is not None:
            timer.cancel()
        self._note_idle()

    def _note_idle(self) -> None:
        if not self.live and not self._held_kv:
            self._idle.set()

    async def abort(self, requests: Iterable[LiveRequest]) -> None:
        """End requests and return when the engine has let go of them."""
        ending = list(requests)
        tasks = [live.task for live in ending if live.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLEAN_UP_S)
        try:
            await self.engine.release([live.engine_id for live in ending])
        except EngineDead:
            self.report_engine_death()

    async def set_role(self, role: common_pb2.Role) -> bool:
        """Change the role and tell every router; False for a role that is none."""
        if role not in ROLE_FROM_PROTO:
            return False
        self.role = ROLE_FROM_PROTO[role]
        policy = self.policy()
        await self.engine.set_policy(self.role.value, policy.value_function, policy.token_budget, policy.relegation)
        log.info("role_changed", role=self.role.value)
        self.broadcast(worker_pb2.AttachResponse(role_changed=worker_pb2.RoleChanged(role=role, policy=policy)))
        return True

    def note_delivery(self, router_id: str, gap_inflation_s: float) -> bool:
        """Take in what a router measured; tell whether the engine should hear of it."""
        if is_allowance(gap_inflation_s):
            self._deliveries_s[router_id] = gap_inflation_s
        else:
            self._deliveries_s.pop(router_id, None)
        return abs(self._worst_delivery_s() - self._applied_delivery_s) > _DELIVERY_STEP_S

    async def apply_delivery(self) -> None:
        """Have the engine leave room for the worst of what the routers measured."""
        self._applied_delivery_s = self._worst_delivery_s()
        await self.engine.set_delivery(self._applied_delivery_s)

    def _worst_delivery_s(self) -> float:
        return max(self._deliveries_s.values(), default=0.0)

    def begin_drain(self, timeout_s: float) -> None:
        """Take no new requests; after timeout_s cancel what is left. A second call can only shorten the time."""
        deadline_s = time.monotonic() + timeout_s
        if self.drain_deadline_s is None or deadline_s < self.drain_deadline_s:
            self.drain_deadline_s = deadline_s
            log.info("draining", timeout_s=timeout_s, live=len(self.live))
            self.drain_begun.set()
            remaining_ms = max(round(timeout_s * 1000), 0)
            self.broadcast(worker_pb2.AttachResponse(draining=worker_pb2.Draining(remaining_ms=remaining_ms)))
            if self._drain is not None:
                self._drain.cancel()
            self._drain = asyncio.create_task(self._finish_drain(timeout_s), name="drain")

    async def drained(self) -> None:
        """Return when a drain that was begun is over: nothing is live, and no KV is kept for others."""
        await self.drain_begun.wait()
        while self._drain is not None and not self._drain.done():
            await asyncio.wait([self._drain])

    async def idle(self) -> None:
        """Return when nothing is live and no KV is kept for others."""
        await self._idle.wait()

    def report_engine_death(self) -> None:
        """Note that the engine is dead: the process has to end."""
        if not self.engine_died.is_set():
            log.error("engine_died", live=len(self.live))
            self.engine_died.set()

    def broadcast(self, message: worker_pb2.AttachResponse) -> None:
        """Say something to every router."""
        for outbox in self.outboxes:
            outbox.put(message)

    async def _finish_drain(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            left = list(self.live.values())
            log.warning("drain_timeout", cancelled=len(left))
            await self.abort(left)
            for live in left:
                live.outbox.put(failed(live.handle, UNAVAILABLE, "the worker is draining", "DRAINING"))

    def _on_report(self, report: StepReport) -> None:
        started: dict[Outbox, list[int]] = {}
        relegated: dict[Outbox, list[int]] = {}
        kv_failed: dict[Outbox, list[int]] = {}
        news = (
            (report.started, started, span_names.PREFILL_STARTED),
            (report.relegated, relegated, span_names.RELEGATED),
            (report.kv_failed, kv_failed, span_names.KV_FAILED),
        )
        for ids, by_outbox, event in news:
            for engine_id in ids:
                if (live := self.live.get(engine_id)) is not None:
                    by_outbox.setdefault(live.outbox, []).append(live.handle)
                    if live.trace is not None:
                        live.trace.event(event)
        metrics.RELEGATED.inc(len(report.relegated))
        metrics.KV_FAILED.inc(len(report.kv_failed))
        for engine_id in report.preempted:
            if (live := self.live.get(engine_id)) is not None:
                live.preemptions += 1
                if live.trace is not None:
                    live.trace.event(span_names.PREEMPTED)
        for outbox, handles in started.items():
            outbox.put_started(handles)
        for outbox, handles in relegated.items():
            outbox.put_relegated(handles)
        for outbox, handles in kv_failed.items():
            outbox.put_kv_failed(handles)
        if report.load is not None and self.last_step is not None:
            load = report.load
            self.last_step.waiting, self.last_step.running = load.waiting, load.running
            self.last_step.kv_usage = load.kv_usage
        if report.step is not None:
            self.steps = report.step.step
            self.last_step = report.step
            metrics.observe_step(report.step)
            for outbox in self.outboxes:
                outbox.put_telemetry(report.step, report.ended_s)


def _kv_transfer(info: KvTransferInfo | None) -> worker_pb2.KvTransfer | None:
    if info is None:
        return None
    return worker_pb2.KvTransfer(
        compatibility=info.compatibility, bytes_per_token=info.bytes_per_token, lease_ms=round(info.lease_s * 1000)
    )


def failed(handle: int, code: int, message: str, reason: str) -> worker_pb2.AttachResponse:
    """Return the message that says a request was refused or failed."""
    metrics.FAILED.labels(reason=reason).inc()
    return worker_pb2.AttachResponse(
        failed=worker_pb2.RequestFailed(handle=handle, code=code, message=message, reason=reason)
    )
