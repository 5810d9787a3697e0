"""`WorkerService.Attach`: one router's stream, from Hello to its end."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable
from typing import Any

import grpc
import grpc.aio

from ascendra.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from services.common.errors import InvalidArgument, ResourceExhausted, Unavailable
from services.common.logging import get_logger
from services.common.wire import model_from_proto
from services.worker import metrics
from services.worker.engine.contract import Delta, EngineDead, EngineRequest, KvUnavailable, RejectedByEngine
from services.worker.outbox import Outbox
from services.worker.submission import engine_request
from services.worker.tracing import AttemptTrace
from services.worker.worker import PROTOCOL_VERSION, UNAVAILABLE, LiveRequest, Worker, failed

log = get_logger()

_HELLO_TIMEOUT_S = 10.0
_MAX_CONTROL_CALLS = 256
_WITHDRAW_RETRY_S = 0.005
_WITHDRAW_RETRIES = 4
_LAST_TOKENS_S = 5.0
_FINISH_REASONS = {"stop": common_pb2.FINISH_REASON_STOP, "length": common_pb2.FINISH_REASON_LENGTH}
_INVALID_ARGUMENT: int = grpc.StatusCode.INVALID_ARGUMENT.value[0]
_INTERNAL: int = grpc.StatusCode.INTERNAL.value[0]


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Serves routers."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def Attach(
        self, request_iterator: AsyncIterator[worker_pb2.AttachRequest], context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncGenerator[worker_pb2.AttachResponse, None]:
        """Serve one router until its stream ends; then abort what it left."""
        hello = await _hello(request_iterator)
        attachment = Attachment(self._worker, hello.router_id)
        responses = attachment.run(request_iterator)
        async with contextlib.aclosing(responses):
            async for response in responses:
                yield response


async def _hello(requests: AsyncIterator[worker_pb2.AttachRequest]) -> worker_pb2.Hello:
    try:
        async with asyncio.timeout(_HELLO_TIMEOUT_S):
            first = await anext(requests)
    except (TimeoutError, StopAsyncIteration):
        raise InvalidArgument(f"hello must be sent within {_HELLO_TIMEOUT_S:g} s") from None
    if first.WhichOneof("message") != "hello":
        raise InvalidArgument(f"the first message must be hello, got {first.WhichOneof('message')}")
    if first.hello.protocol_version != PROTOCOL_VERSION:
        raise InvalidArgument(f"hello.protocol_version must be {PROTOCOL_VERSION}, got {first.hello.protocol_version}")
    return first.hello


class Attachment:
    """One router's stream and its requests."""

    def __init__(self, worker: Worker, router_id: str) -> None:
        self._worker = worker
        self._router_id = router_id
        self._outbox = Outbox()
        self._live: dict[int, LiveRequest] = {}
        self._control: set[asyncio.Task[None]] = set()
        self._control_slots = asyncio.Semaphore(_MAX_CONTROL_CALLS)
        self._exported: dict[int, str] = {}

    async def run(
        self, requests: AsyncIterator[worker_pb2.AttachRequest]
    ) -> AsyncGenerator[worker_pb2.AttachResponse, None]:
        """Yield what the router should hear until it closes its side, or the engine dies."""
        worker = self._worker
        try:
            welcome = await worker.welcome()
        except EngineDead:
            worker.report_engine_death()
            raise Unavailable("the engine died", reason="ENGINE_DIED", retry_safe=True) from None
        yield worker_pb2.AttachResponse(welcome=welcome)
        worker.outboxes.add(self._outbox)
        metrics.ROUTERS.inc()
        log.info("router_attached", router_id=self._router_id)
        reader = asyncio.create_task(self._read(requests), name=f"read-{self._router_id}")
        try:
            while True:
                message = await self._outbox.next(worker.config.heartbeat_ms / 1000)
                if message is not None:
                    yield message
                elif self._outbox.closed:
                    return
                else:
                    yield worker_pb2.AttachResponse(heartbeat=worker.heartbeat())
                if self._outbox.overflowed:
                    metrics.OVERFLOWS.inc()
                    raise ResourceExhausted("the router does not read its stream", reason="SLOW_READER")
        finally:
            worker.outboxes.discard(self._outbox)
            worker.note_delivery(self._router_id, 0.0)
            metrics.ROUTERS.dec()
            log.info("router_detached", router_id=self._router_id, aborted=len(self._live))
            await self._end(reader)

    async def _end(self, reader: "asyncio.Task[None]") -> None:
        reader.cancel()
        for task in self._control:
            task.cancel()
        await asyncio.gather(reader, *self._control, return_exceptions=True)
        if self._live:
            await self._worker.abort(self._live.values())

    async def _read(self, requests: AsyncIterator[worker_pb2.AttachRequest]) -> None:
        try:
            async for request in requests:
                await self._handle(request)
        except grpc.aio.AioRpcError as error:
            log.info("router_stream_broken", router_id=self._router_id, status=error.code().name)
        except Exception:
            log.exception("router_stream_failed", router_id=self._router_id)
        finally:
            self._outbox.close()

    async def _handle(self, request: worker_pb2.AttachRequest) -> None:
        match request.WhichOneof("message"):
            case "submit":
                self._submit(request.submit)
            case "withdraw":
                await self._start_control(self._withdraw(request.withdraw))
            case "export_kv":
                await self._start_control(self._export_kv(request.export_kv))
            case "release_kv":
                await self._start_control(self._release_kv(request.release_kv.handles))
            case "cancel":
                await self._start_control(self._cancel(request.cancel.handles))
            case "reprioritise":
                await self._start_control(self._reprioritise(request.reprioritise))
            case "set_role":
                await self._start_control(self._set_role(request.set_role.role))
            case "step_time_model":
                await self._start_control(self._adopt(request.step_time_model))
            case "begin_drain":
                timeout_ms = request.begin_drain.timeout_ms
                self._worker.begin_drain(timeout_ms / 1000 if timeout_ms else self._worker.config.drain_timeout_s)
            case "ping":
                self._outbox.put(worker_pb2.AttachResponse(pong=worker_pb2.Pong(ping_id=request.ping.ping_id)))
                if self._worker.note_delivery(self._router_id, request.ping.gap_inflation_s):
                    await self._start_control(self._worker.apply_delivery())
            case other:
                log.warning("message_ignored", kind=other, router_id=self._router_id)

    def _submit(self, submit: worker_pb2.Submit) -> None:
        worker = self._worker
        handle = submit.handle
        if worker.engine_died.is_set():
            self._outbox.put(failed(handle, UNAVAILABLE, "the engine died", "ENGINE_DIED"))
            return
        if worker.draining:
            self._outbox.put(failed(handle, UNAVAILABLE, "the worker is draining", "DRAINING"))
            return
        if len(worker.live) >= worker.config.max_live_requests:
            limit = worker.config.max_live_requests
            self._outbox.put(failed(handle, UNAVAILABLE, f"the worker holds {limit} requests", "QUEUE_FULL"))
            return
        live = worker.add(handle, submit.request_id, self._outbox, submit.generated_tokens)
        try:
            if handle in self._live:
                raise InvalidArgument(f"handle {handle} is in use on this stream")
            request = engine_request(submit, worker.engine.info, live.engine_id, time.monotonic())
        except InvalidArgument as error:
            worker.remove(live)
            self._outbox.put(failed(handle, _INVALID_ARGUMENT, error.message, error.reason))
            return
        if worker.tracer is not None:
            live.trace = AttemptTrace(worker.tracer, submit, worker.facts())
        self._live[handle] = live
        live.task = asyncio.create_task(self._generate(live, request), name=f"generate-{live.engine_id}")

    async def _generate(self, live: LiveRequest, request: EngineRequest) -> None:
        worker, outbox = self._worker, self._outbox
        constrained = request.sampling.HasField("structured_output")
        try:
            async with contextlib.aclosing(worker.engine.generate(request)) as deltas:
                async for delta in deltas:
                    if delta.finish == "error" and constrained and not live.delivered_tokens:
                        raise RejectedByEngine("sampling.structured_output: the engine cannot compile it")
                    self._deliver(live, delta)
        except RejectedByEngine as error:
            outbox.put(failed(live.handle, _INVALID_ARGUMENT, str(error), "INVALID_ARGUMENT"))
        except EngineDead:
            worker.report_engine_death()
            outbox.put(failed(live.handle, UNAVAILABLE, "the engine died", "ENGINE_DIED"))
        except Exception:
            log.exception("generate_failed", request_id=live.request_id)
            outbox.put(failed(live.handle, _INTERNAL, "internal error", "INTERNAL"))
        finally:
            self._live.pop(live.handle, None)
            worker.remove(live)

    def _deliver(self, live: LiveRequest, delta: Delta) -> None:
        outbox = self._outbox
        if not self._worker.engine.info.policies:
            self._worker.steps += 1  # no telemetry says that the engine moves on; its tokens do
        if delta.token_ids:
            if live.trace is not None:
                live.trace.tokens(len(delta.token_ids))
            outbox.put_tokens(live.handle, delta.token_ids, delta.logprobs)
            live.delivered(len(delta.token_ids))
        if not delta.finish:
            return
        if delta.finish == "abort":
            # Nobody here asked for it: the engine core is going down, whatever it says.
            self._worker.report_engine_death()
            outbox.put(failed(live.handle, UNAVAILABLE, "the engine gave the request up", "ENGINE_DIED"))
            return
        if delta.finish not in _FINISH_REASONS:
            outbox.put(failed(live.handle, _INTERNAL, f"the engine ended it: {delta.finish}", "ENGINE_ERROR"))
            return
        ended = worker_pb2.RequestEnded(
            handle=live.handle,
            reason=_FINISH_REASONS[delta.finish],
            cached_prompt_tokens=delta.cached_prompt_tokens,
            preemptions=live.preemptions,
        )
        if live.trace is not None:
            live.trace.finished(delta.finish, delta.cached_prompt_tokens)
        if delta.finish == "stop":
            stop = delta.stop_token_id
            ended.stop_token_id = delta.token_ids[-1] if stop is None and delta.token_ids else stop or 0
        outbox.put_ended(ended)

    async def _withdraw(self, asked: worker_pb2.Withdraw) -> None:
        mine = {live.engine_id: live for handle in asked.handles if (live := self._live.get(handle)) is not None}
        withdrawn: list[LiveRequest] = []
        pending = list(mine)
        for _ in range(_WITHDRAW_RETRIES):
            if not pending:
                break
            outcome = await self._worker.engine.withdraw(pending)
            withdrawn += [mine[engine_id] for engine_id in outcome.withdrawn]
            # A submission may still be on its way to the engine core; one that ended is no longer here.
            pending = [engine_id for engine_id in outcome.unknown if engine_id in self._worker.live]
            if pending:
                await asyncio.sleep(_WITHDRAW_RETRY_S)
        await self._worker.abort(withdrawn)
        gone = {live.handle for live in withdrawn}
        kept = [handle for handle in asked.handles if handle not in gone]
        metrics.WITHDRAWN.inc(len(gone))
        metrics.WITHDRAW_KEPT.inc(len(kept))
        answer = worker_pb2.Withdrawn(withdraw_id=asked.withdraw_id, withdrawn_handles=sorted(gone), kept_handles=kept)
        self._outbox.put(worker_pb2.AttachResponse(withdrawn=answer))

    async def _export_kv(self, asked: worker_pb2.ExportKv) -> None:
        answer = worker_pb2.KvExported(export_id=asked.export_id, handle=asked.handle)
        live = self._live.get(asked.handle)
        try:
            if live is None:
                raise KvUnavailable("it is not on this worker")
            exported = await self._worker.engine.export_kv(live.engine_id)
        except KvUnavailable as error:
            answer.refused = str(error)
            self._outbox.put(worker_pb2.AttachResponse(kv_exported=answer))
            return
        assert self._worker.engine.info.kv_transfer is not None
        self._exported[asked.handle] = live.engine_id
        self._worker.hold_kv(live.engine_id, self._worker.engine.info.kv_transfer.lease_s)
        metrics.KV_EXPORTED.inc()
        try:
            # Its last tokens take another way from the engine core than the answer did.
            async with asyncio.timeout(_LAST_TOKENS_S):
                await live.until_delivered(exported.generated_tokens)
        except TimeoutError:
            await self._worker.abort([live])
            await self._release_kv([asked.handle])
            self._outbox.put(failed(asked.handle, UNAVAILABLE, "its last tokens did not come", "KV_EXPORT"))
            return
        answer.kv_handle = exported.handle
        answer.next_offset = live.first_offset + live.delivered_tokens
        self._outbox.put(worker_pb2.AttachResponse(kv_exported=answer))
        await self._worker.abort([live])  # the engine has let go of it; its front end has not

    async def _release_kv(self, handles: Iterable[int]) -> None:
        ids = [engine_id for handle in handles if (engine_id := self._exported.pop(handle, None)) is not None]
        await self._worker.release_kv(ids)

    async def _cancel(self, handles: Iterable[int]) -> None:
        asked = list(handles)
        await self._worker.abort([live for handle in asked if (live := self._live.get(handle)) is not None])
        self._outbox.put(worker_pb2.AttachResponse(cancelled=worker_pb2.Cancelled(handles=asked)))

    async def _reprioritise(self, asked: worker_pb2.Reprioritise) -> None:
        ids = [live.engine_id for handle in asked.handles if (live := self._live.get(handle)) is not None]
        await self._worker.engine.reprioritise(ids, relegated=asked.relegated)

    async def _set_role(self, role: common_pb2.Role) -> None:
        if not await self._worker.set_role(role):
            log.warning("role_refused", role=role, router_id=self._router_id)

    async def _adopt(self, model: common_pb2.StepTimeModel) -> None:
        try:
            model_from_proto(model)
        except ValueError as error:
            log.warning("step_time_model_refused", why=str(error))
            return
        await self._worker.engine.set_step_time_model(model)

    async def _start_control(self, call: Coroutine[Any, Any, None]) -> None:
        """Run a call beside the reading of the stream; wait only when the router has very many of them open."""
        await self._control_slots.acquire()
        task = asyncio.create_task(self._run_control(call))
        self._control.add(task)
        task.add_done_callback(self._control.discard)

    async def _run_control(self, call: Coroutine[Any, Any, None]) -> None:
        try:
            await call
        except EngineDead:
            self._worker.report_engine_death()
        except Exception:
            log.exception("control_failed", router_id=self._router_id)
        finally:
            self._control_slots.release()
