"""The one stream between this router and one worker: dialling, heartbeats, writing, and taking the stream apart."""

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import grpc
import grpc.aio

from ascendra.errors import InvalidArgumentError
from ascendra.tls import Tls
from ascendra.v1 import cluster_pb2, worker_pb2, worker_pb2_grpc
from services.common.channels import Connector
from services.common.logging import get_logger
from services.common.wire import ROLE_FROM_PROTO
from services.policy.delivery import DeliverySpread
from services.policy.liveness import SilenceDetector
from services.policy.state import Role
from services.router import metrics
from services.router.breaker import Breaker
from services.router.instance import Instance, Placed

log = get_logger()

_Call: TypeAlias = "grpc.aio.StreamStreamCall[worker_pb2.AttachRequest, worker_pb2.AttachResponse]"
PROTOCOL_VERSION = 1
_MAX_UNSENT = 8192
_BACKOFF_S = (0.05, 2.0)
"""First and longest pause between two dials."""
_WELCOME_TIMEOUT_S = 10.0
_PING_S = 1.0
_RTT_SHARE = 0.2
_LOOK_S = 0.1
"""Time between two looks at whether the worker is silent or stalled."""
_SHORTEST_HEARTBEAT_S = 0.05
_SILENT, _STALLED = "silent", "stalled"


class LinkEvents(Protocol):
    """What a link tells its owner; called from the reading task, must not wait."""

    def on_up(self, link: "WorkerLink") -> None:
        """The worker said Welcome."""

    def on_down(self, link: "WorkerLink", orphans: Sequence[Placed], why: str) -> None:
        """The stream ended; these requests were on it and nothing more will come for them."""

    def on_step(self, link: "WorkerLink", step: worker_pb2.StepOutput, now_s: float) -> None:
        """Tokens and telemetry; telemetry is already in the link's instance."""

    def on_withdrawn(self, link: "WorkerLink", withdrawn: worker_pb2.Withdrawn) -> None:
        """Answer to a withdrawal."""

    def on_failed(self, link: "WorkerLink", failed: worker_pb2.RequestFailed) -> None:
        """A request was refused, or the engine failed it."""

    def on_draining(self, link: "WorkerLink", remaining_s: float) -> None:
        """The worker takes no new requests."""

    def on_kv_exported(self, link: "WorkerLink", exported: worker_pb2.KvExported) -> None:
        """Answer to the question for a KV cache."""

    def on_cancelled(self, link: "WorkerLink", handles: Sequence[int]) -> None:
        """The worker has let go of attempts that were aborted."""


class Suspect(Exception):
    """The worker is not to be trusted any more; the stream is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """Limits of a link."""

    router_id: str
    model_name: str
    silence_s: float
    stall_s: float
    stall_unknown_s: float
    cancel_timeout_s: float
    breaker_failures: int
    breaker_open_s: float
    tls: Tls | None = None
    """How to connect; None: in plaintext."""


class WorkerLink:
    """A worker, attached or being dialled."""

    def __init__(self, address: str, settings: LinkSettings, instance: Instance, events: LinkEvents) -> None:
        """Make a link; `run` attaches it and keeps `instance` current."""
        self.address = address
        self.settings = settings
        self.instance = instance
        self.breaker = Breaker(settings.breaker_failures, settings.breaker_open_s)
        self.welcome: worker_pb2.Welcome | None = None
        """Of the present stream; None while not attached."""
        self.known = worker_pb2.Welcome()
        """The last one received."""
        self.placed: dict[int, Placed] = {}
        """Live handles."""
        self.refused_why = ""
        """Why an attached worker is not used."""
        self._events = events
        self._handles = itertools.count(1)
        self._ids = itertools.count(1)
        self._unsent: deque[worker_pb2.AttachRequest] = deque()
        self._to_cancel: list[int] = []
        self._cancelling: dict[int, float] = {}
        self._unsent_event = asyncio.Event()
        self._sequence = 0
        self._pings: dict[int, float] = {}
        self._delivery = DeliverySpread()
        self._step_before = 0
        self._step_before_s = 0.0
        self._sever: str = ""
        self._severed = asyncio.Event()
        self._role_changed = asyncio.Event()
        self._silence = SilenceDetector(settings.silence_s, _SHORTEST_HEARTBEAT_S, 0.0)

    @property
    def worker_id(self) -> str:
        """The worker's id; empty before its first Welcome."""
        return self.known.worker_id

    @property
    def attached(self) -> bool:
        """Requests can be sent."""
        return self.welcome is not None and not self.refused_why

    @property
    def draining(self) -> bool:
        """The worker takes no new requests."""
        return self.instance.view.draining

    @property
    def lost_cause(self) -> str:
        """Why its last stream ended, in one word."""
        return self._sever if self._sever in (_SILENT, _STALLED) else "stream_ended"

    def health(self) -> "cluster_pb2.WorkerHealth":
        """Return the state of the circuit."""
        if not self.attached:
            return cluster_pb2.WORKER_HEALTH_CONNECTING
        if self.draining:
            return cluster_pb2.WORKER_HEALTH_DRAINING
        return cluster_pb2.WORKER_HEALTH_TRIPPED if self.breaker.tripped else cluster_pb2.WORKER_HEALTH_READY

    def takes_requests(self, now_s: float) -> bool:
        """Return whether a request may be sent now."""
        return self.attached and not self.draining and self.breaker.allows(now_s) and len(self._unsent) < _MAX_UNSENT

    def new_handle(self) -> int:
        """Return a handle that was never used on this link."""
        return next(self._handles)

    def submit(self, placed: Placed, message: worker_pb2.Submit) -> None:
        """Send a request and count it at once."""
        self.placed[placed.handle] = placed
        self.instance.submitted(placed)
        self.breaker.sent()
        self._send(worker_pb2.AttachRequest(submit=message))

    def forget(self, placed: Placed) -> None:
        """Stop listening to an attempt that ended or was given up; tokens that still come are stale."""
        if self.placed.pop(placed.handle, None) is not None:
            self.instance.gone(placed)
            self.breaker.trial_lost()

    def cancel(self, placed: Placed) -> None:
        """Abort an attempt and stop listening to it. The worker has to acknowledge within the limit."""
        if placed.handle not in self.placed:
            return
        self.forget(placed)
        if self.welcome is not None:
            self._to_cancel.append(placed.handle)
            self._cancelling[placed.handle] = time.monotonic() + self.settings.cancel_timeout_s
            self._unsent_event.set()

    def withdraw(self, placed: Sequence[Placed]) -> int:
        """Ask for requests back that were never scheduled; answered by on_withdrawn with the returned id."""
        withdraw_id = next(self._ids)
        handles = [one.handle for one in placed]
        self._send(worker_pb2.AttachRequest(withdraw=worker_pb2.Withdraw(withdraw_id=withdraw_id, handles=handles)))
        return withdraw_id

    def export_kv(self, placed: Placed) -> int:
        """Ask for a running request with its KV cache; answered by on_kv_exported with the returned id."""
        export_id = next(self._ids)
        asked = worker_pb2.ExportKv(export_id=export_id, handle=placed.handle)
        self._send(worker_pb2.AttachRequest(export_kv=asked))
        return export_id

    def release_kv(self, handle: int) -> None:
        """Say that nobody reads the KV cache of an exported request any more."""
        if self.welcome is not None:
            self._send(worker_pb2.AttachRequest(release_kv=worker_pb2.ReleaseKv(handles=[handle])))

    def send_control(self, message: worker_pb2.AttachRequest) -> None:
        """Send SetRole, BeginDrain or Reprioritise."""
        self._send(message)

    async def role_is(self, role: Role) -> None:
        """Return when the worker says that it has this role."""
        while self.instance.view.role is not role:
            self._role_changed.clear()
            await self._role_changed.wait()

    def sever(self, why: str) -> None:
        """Give the stream up: the worker aborts what is on it, and it is dialled again."""
        self._sever = why
        self._severed.set()

    async def run(self) -> None:
        """Keep attached until cancelled."""
        pause_s = _BACKOFF_S[0]
        connector = Connector(self.address, self.settings.tls)
        try:
            while True:
                began_s = time.monotonic()
                why = await self._attach_once(connector)
                was_up = self._down(why)
                metrics.LINK_LOSSES.inc()
                if was_up:
                    log.warning("worker_lost", address=self.address, worker_id=self.worker_id, why=why)
                pause_s = _BACKOFF_S[0] if time.monotonic() - began_s > 1.0 else min(pause_s * 2, _BACKOFF_S[1])
                if self._sever == _SILENT:
                    # The connection may lead nowhere, which gRPC's own keepalive notices much later.
                    await connector.close()
                await asyncio.sleep(pause_s)
        finally:
            self._down("the router stops")
            await connector.close()

    async def _attach_once(self, connector: Connector) -> str:
        """Serve one stream to its end and return why it ended."""
        self._severed.clear()
        self._sever = ""
        try:
            channel = await connector.channel()
        except InvalidArgumentError as error:
            return error.message
        stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
        call = stub.Attach()  # type: ignore[call-arg]  # written through the call
        hello = worker_pb2.Hello(router_id=self.settings.router_id, protocol_version=PROTOCOL_VERSION)
        try:
            async with asyncio.timeout(_WELCOME_TIMEOUT_S):
                await call.write(worker_pb2.AttachRequest(hello=hello))
                first = await call.read()
            if not isinstance(first, worker_pb2.AttachResponse) or first.WhichOneof("message") != "welcome":
                return "the worker did not say welcome"
            self._up(first.welcome)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(call))
                tasks.create_task(self._write(call))
                tasks.create_task(self._watch())
        except TimeoutError:
            self._sever = _SILENT
            return "no welcome in time"
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        except asyncio.InvalidStateError:
            return "the stream broke while it was written"
        except BaseExceptionGroup as group:
            first_error = group.exceptions[0]
            if isinstance(first_error, grpc.aio.AioRpcError):
                return f"{first_error.code().name}: {first_error.details()}"
            if isinstance(first_error, (Suspect, asyncio.InvalidStateError)):
                return str(first_error)
            if not isinstance(first_error, Exception):
                raise
            log.exception("link_failed", address=self.address, exc_info=first_error)
            return f"internal error: {type(first_error).__name__}"
        finally:
            call.cancel()
        return "the worker ended the stream"

    def _up(self, welcome: worker_pb2.Welcome) -> None:
        now_s = time.monotonic()
        self._unsent.clear()
        self._to_cancel.clear()
        self._cancelling.clear()
        self._pings.clear()
        self._sequence = 0
        self.welcome = self.known = welcome
        self.instance.welcome(welcome, now_s)
        heartbeat_s = max(welcome.heartbeat_ms / 1000, _SHORTEST_HEARTBEAT_S)
        self._silence = SilenceDetector(self.settings.silence_s, heartbeat_s, now_s)
        self.refused_why = self._unusable(welcome)
        if self.refused_why:
            log.error("worker_refused", address=self.address, worker_id=welcome.worker_id, why=self.refused_why)
            return
        log.info("worker_attached", address=self.address, worker_id=welcome.worker_id, role=self.instance.view.role)
        self._events.on_up(self)

    def _unusable(self, welcome: worker_pb2.Welcome) -> str:
        if welcome.protocol_version != PROTOCOL_VERSION:
            return f"it speaks protocol version {welcome.protocol_version}, this router {PROTOCOL_VERSION}"
        if welcome.model != self.settings.model_name:
            return f"it serves model {welcome.model!r}, this router {self.settings.model_name!r}"
        return ""

    def _down(self, why: str) -> bool:
        """Report the end of a stream once; False when it was not up."""
        was_up = self.welcome is not None
        self.welcome = None
        if was_up:
            orphans = list(self.placed.values())
            if self._sever or orphans:
                self.breaker.failed(time.monotonic())  # before they are forgotten: one may be the trial of a circuit
            for placed in orphans:
                self.forget(placed)
            self._events.on_down(self, orphans, why)
        return was_up

    def _send(self, message: worker_pb2.AttachRequest) -> None:
        self._unsent.append(message)
        self._unsent_event.set()

    async def _write(self, call: _Call) -> None:
        while True:
            await self._unsent_event.wait()
            self._unsent_event.clear()
            while self._unsent or self._to_cancel:
                while self._unsent:
                    await call.write(self._unsent.popleft())
                if self._to_cancel:
                    handles, self._to_cancel = self._to_cancel, []
                    await call.write(worker_pb2.AttachRequest(cancel=worker_pb2.Cancel(handles=handles)))

    async def _read(self, call: _Call) -> None:
        while isinstance(response := await call.read(), worker_pb2.AttachResponse):
            now_s = self.instance.last_message_s = time.monotonic()
            self._silence.heard(now_s)
            kind = response.WhichOneof("message")
            if kind == "step":
                self._on_step(response.step, now_s)
            else:
                self._on_other(kind, response, now_s)
        raise Suspect("the worker ended the stream")

    def _on_step(self, step: worker_pb2.StepOutput, now_s: float) -> None:
        if step.sequence != self._sequence + 1:
            if step.sequence <= self._sequence:
                metrics.DROPPED_FRAMES.labels(reason="repeated").inc()
                return
            metrics.DROPPED_FRAMES.labels(reason="gap").inc()
            raise Suspect(f"message {step.sequence} follows {self._sequence}: some are missing")
        self._sequence = step.sequence
        self._observe_delivery(step, now_s)
        for telemetry in step.telemetry:
            self.instance.telemetry(telemetry, now_s)
        self._events.on_step(self, step, now_s)

    def _observe_delivery(self, step: worker_pb2.StepOutput, now_s: float) -> None:
        """Learn how much longer gaps are here than in the engine, from steps that follow each other without a pause."""
        last = step.telemetry[-1] if len(step.telemetry) == 1 and step.token_ids else None
        before, before_s = self._step_before, self._step_before_s
        if last is not None and last.step == before + 1:
            self._delivery.observe(now_s - before_s, last.step_s)
        self._step_before = last.step if last is not None and last.running else 0
        self._step_before_s = now_s

    def _on_other(self, kind: str | None, response: worker_pb2.AttachResponse, now_s: float) -> None:
        match kind:
            case "heartbeat":
                self.instance.heartbeat(response.heartbeat, now_s)
            case "withdrawn":
                self._events.on_withdrawn(self, response.withdrawn)
            case "failed":
                self._events.on_failed(self, response.failed)
            case "cancelled":
                for handle in response.cancelled.handles:
                    self._cancelling.pop(handle, None)
                self._events.on_cancelled(self, response.cancelled.handles)
            case "kv_exported":
                self._events.on_kv_exported(self, response.kv_exported)
            case "pong":
                sent_s = self._pings.pop(response.pong.ping_id, None)
                if sent_s is not None:
                    rtt_s, known_s = now_s - sent_s, self.instance.round_trip_s
                    self.instance.round_trip_s = known_s + _RTT_SHARE * (rtt_s - known_s) if known_s else rtt_s
            case "role_changed":
                self._on_role_changed(response.role_changed)
            case "draining":
                self.instance.view.draining = True
                self._events.on_draining(self, response.draining.remaining_ms / 1000)
            case _:
                log.warning("message_ignored", kind=kind, worker_id=self.worker_id)

    def _on_role_changed(self, changed: worker_pb2.RoleChanged) -> None:
        self._role_changed.set()
        self.instance.adopt(changed.policy)
        self.instance.view.role = ROLE_FROM_PROTO.get(changed.role, self.instance.view.role)

    async def _watch(self) -> None:
        """Ping, and give the stream up when the worker is silent, stalled, or told to go."""
        next_ping_s = 0.0
        held_up = False
        while True:
            slept_s = time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._severed.wait()
            if self._severed.is_set():
                raise Suspect(self._sever)
            now_s = time.monotonic()
            held_up, was_held_up = now_s - slept_s > 2 * _LOOK_S, held_up
            if held_up and not was_held_up:
                continue  # this process was: what the worker said may be unread until the next look
            if self._silence.silent(now_s):
                self._sever = _SILENT
                raise Suspect(f"silent for {now_s - self.instance.last_message_s:.1f} s")
            stall_s = self.instance.stall_limit_s(now_s, self.settings.stall_s, self.settings.stall_unknown_s)
            if self.instance.stalled(now_s, stall_s):
                self._sever = _STALLED
                raise Suspect(f"its steps stand still for {stall_s:.1f} s with work queued")
            self._expire_cancellations(now_s)
            if now_s >= next_ping_s:
                next_ping_s = now_s + _PING_S
                self._pings = {i: t for i, t in self._pings.items() if now_s - t < 10 * _PING_S}
                ping_id = next(self._ids)
                self._pings[ping_id] = now_s
                ping = worker_pb2.Ping(ping_id=ping_id, gap_inflation_s=self._delivery.allowance_s())
                self._send(worker_pb2.AttachRequest(ping=ping))

    def _expire_cancellations(self, now_s: float) -> None:
        late = [handle for handle, limit_s in self._cancelling.items() if limit_s < now_s]
        for handle in late:
            del self._cancelling[handle]
        if late:
            metrics.CANCEL_TIMEOUTS.inc(len(late))
            log.warning("cancel_not_acknowledged", worker_id=self.worker_id, handles=late)
            self.breaker.failed(now_s)
