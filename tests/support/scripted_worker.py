"""A worker that does what a test says: real gRPC over a real socket, tokens and faults by script."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc.aio

from ascendra.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from services.common.access import named_peers
from services.common.grpc_server import GrpcServer, start_grpc_server
from services.common.tls import PLAINTEXT, TlsConfig
from services.policy.state import Role

_ROLES = {
    Role.LOW: common_pb2.ROLE_LOW_PRIORITY,
    Role.HIGH: common_pb2.ROLE_HIGH_PRIORITY,
    Role.UNIFIED: common_pb2.ROLE_UNIFIED,
}
TokenRule = Callable[[worker_pb2.Submit, int], int]
"""(submission, absolute offset) -> token id."""


def counting_tokens(submit: worker_pb2.Submit, offset: int) -> int:
    """Return printable ASCII letters of the tiny tokenizer that depend on the offset only."""
    return 66 + offset % 26


class ScriptedWorker:
    """Serves Attach. By default it answers every Submit with one token a step; a test may take any part over.

    Attributes that a test may set at any time:
        step_s: seconds between steps.
        hold: submissions wait (never start) while it is set.
        flowing: nothing at all is sent while it is clear, heartbeats included.
        freeze_steps: heartbeats go on but no step is taken.
        ignore_cancel: Cancel is not acknowledged.
        top_logprobs: every token comes with so many log-probabilities.
        refuse: answer every Submit with RequestFailed of this (code, message, reason).
        drop_on_submit: every Submit ends the stream, as when the worker dies of it.
        fails_withdrawals: requests that are asked back fail instead, as when the engine dies meanwhile.
        ignore_export: ExportKv is not answered.
        refuse_export: answer every ExportKv with this reason.
        kv_read: what becomes of a Submit with a KV handle: "ok", "failed" (reported, then computed) or "stuck".
    """

    def __init__(self, worker_id: str = "w1", *, role: Role = Role.UNIFIED, **welcome: Any) -> None:
        """Prepare; keywords override fields of Welcome."""
        defaults: dict[str, Any] = {
            "worker_id": worker_id,
            "protocol_version": 1,
            "role": _ROLES[role],
            "model": "tiny",
            "max_model_len": 2048,
            "vocab_size": 512,
            "max_num_seqs": 256,
            "max_num_batched_tokens": 2048,
            "kv_capacity_tokens": 100_000,
            "engine": "scripted",
            "incarnation": "1",
            "heartbeat_ms": 100,
            "continuation": worker_pb2.Continuation(keyed_noise=True, carried_penalties=True, dtype="float32"),
            "policy": worker_pb2.SchedulingPolicy(value_function="llf", token_budget="dynamic", relegation="none"),
        }
        self.welcome = worker_pb2.Welcome(**(defaults | welcome))
        self.tokens: TokenRule = counting_tokens
        self.step_s = 0.002
        self.hold = False
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.freeze_steps = False
        self.ignore_cancel = False
        self.top_logprobs = 0
        self.refuse: tuple[int, str, str] | None = None
        self.drop_on_submit = False
        self.fails_withdrawals = False
        self.ignore_export = False
        self.refuse_export = ""
        self.kv_read = "ok"
        self.exported: list[int] = []
        self.released: list[int] = []
        self.submitted: list[worker_pb2.Submit] = []
        self.cancelled: list[int] = []
        self.withdrawn: list[int] = []
        self.received: list[worker_pb2.AttachRequest] = []
        self.streams = 0
        self.attached = asyncio.Event()
        self._out: asyncio.Queue[worker_pb2.AttachResponse | None] = asyncio.Queue()
        self._live: dict[int, tuple[worker_pb2.Submit, int]] = {}
        self._sequence = itertools.count(1)
        self._steps = 0
        self._server: GrpcServer | None = None

    @property
    def address(self) -> str:
        """Where it listens."""
        assert self._server is not None
        return self._server.address

    async def start(self, listen: str = "127.0.0.1:0", tls: TlsConfig = PLAINTEXT) -> None:
        """Listen."""
        self._server = await start_grpc_server(listen, self._register, tls=tls, authorize=named_peers(tls))

    async def stop(self) -> None:
        """End every stream and stop listening."""
        self.drop_stream()
        if self._server is not None:
            await self._server.stop(0)

    def drop_stream(self) -> None:
        """End the stream as a dying worker does."""
        self._live.clear()
        self._out.put_nowait(None)

    def send(self, message: worker_pb2.AttachResponse) -> None:
        """Send anything."""
        self._out.put_nowait(message)

    def send_step(self, *, sequence: int | None = None, **fields: Any) -> None:
        """Send a StepOutput; `sequence` overrides the right number and leaves the count alone."""
        number = next(self._sequence) if sequence is None else sequence
        self.send(worker_pb2.AttachResponse(step=worker_pb2.StepOutput(sequence=number, **fields)))

    def _register(self, server: grpc.aio.Server) -> Sequence[str]:
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(_Servicer(self), server)
        return ["ascendra.v1.WorkerService"]

    async def serve(
        self, requests: AsyncIterator[worker_pb2.AttachRequest]
    ) -> AsyncIterator[worker_pb2.AttachResponse]:
        """Serve one stream."""
        first = await anext(requests)
        assert first.WhichOneof("message") == "hello"
        self.streams += 1
        self._out = asyncio.Queue()
        self._sequence = itertools.count(1)
        self._live.clear()
        yield worker_pb2.AttachResponse(welcome=self.welcome)
        self.attached.set()
        tasks = [asyncio.create_task(self._read(requests)), asyncio.create_task(self._run_steps())]
        try:
            while True:
                try:
                    async with asyncio.timeout(self.welcome.heartbeat_ms / 2000):
                        message = await self._out.get()
                except TimeoutError:
                    message = worker_pb2.AttachResponse(heartbeat=self._heartbeat())
                if message is None:
                    return
                await self.flowing.wait()
                yield message
        finally:
            self.attached.clear()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _heartbeat(self) -> worker_pb2.Heartbeat:
        return worker_pb2.Heartbeat(
            steps=self._steps, waiting=len(self._live) if self.hold else 0, running=len(self._live)
        )

    async def _read(self, requests: AsyncIterator[worker_pb2.AttachRequest]) -> None:
        async for request in requests:
            self.received.append(request)
            match request.WhichOneof("message"):
                case "submit":
                    self._submit(request.submit)
                case "cancel":
                    self._cancel(list(request.cancel.handles))
                case "withdraw":
                    self._withdraw(request.withdraw)
                case "export_kv":
                    self._export(request.export_kv)
                case "release_kv":
                    self.released += request.release_kv.handles
                case "ping":
                    self.send(worker_pb2.AttachResponse(pong=worker_pb2.Pong(ping_id=request.ping.ping_id)))
                case "set_role":
                    changed = worker_pb2.RoleChanged(role=request.set_role.role, policy=self.welcome.policy)
                    self.send(worker_pb2.AttachResponse(role_changed=changed))
                case "begin_drain":
                    self.send(worker_pb2.AttachResponse(draining=worker_pb2.Draining(remaining_ms=1000)))

    def _submit(self, submit: worker_pb2.Submit) -> None:
        self.submitted.append(submit)
        if self.drop_on_submit:
            self.drop_stream()
            return
        if self.refuse is not None:
            code, message, reason = self.refuse
            failed = worker_pb2.RequestFailed(handle=submit.handle, code=code, message=message, reason=reason)
            self.send(worker_pb2.AttachResponse(failed=failed))
            return
        if submit.kv_handle and self.kv_read == "stuck":
            return
        if submit.kv_handle and self.kv_read == "failed":
            self.send_step(kv_failed_handles=[submit.handle])
        self._live[submit.handle] = (submit, submit.generated_tokens)

    def _export(self, asked: worker_pb2.ExportKv) -> None:
        if self.ignore_export:
            return
        answer = worker_pb2.KvExported(export_id=asked.export_id, handle=asked.handle, refused=self.refuse_export)
        if not self.refuse_export:
            _, answer.next_offset = self._live.pop(asked.handle)
            answer.kv_handle = f"kv of {asked.handle}".encode()
            self.exported.append(asked.handle)
        self.send(worker_pb2.AttachResponse(kv_exported=answer))

    def _cancel(self, handles: list[int]) -> None:
        self.cancelled += handles
        for handle in handles:
            self._live.pop(handle, None)
        if not self.ignore_cancel:
            self.send(worker_pb2.AttachResponse(cancelled=worker_pb2.Cancelled(handles=handles)))

    def _withdraw(self, withdraw: worker_pb2.Withdraw) -> None:
        if self.fails_withdrawals:
            for handle in withdraw.handles:
                del self._live[handle]
                failed = worker_pb2.RequestFailed(handle=handle, code=14, message="dead", reason="ENGINE_DIED")
                self.send(worker_pb2.AttachResponse(failed=failed))
            return
        gone, kept = [], []
        for handle in withdraw.handles:
            submit, offset = self._live.get(handle, (None, 0))
            if submit is not None and offset == submit.generated_tokens and self.hold:
                del self._live[handle]
                gone.append(handle)
            else:
                kept.append(handle)
        self.withdrawn += gone
        answer = worker_pb2.Withdrawn(withdraw_id=withdraw.withdraw_id, withdrawn_handles=gone, kept_handles=kept)
        self.send(worker_pb2.AttachResponse(withdrawn=answer))

    async def _run_steps(self) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            if self._live and not self.hold and self.flowing.is_set() and not self.freeze_steps:
                self._step()

    def _step(self) -> None:
        self._steps += 1
        handles, token_ids, ended = [], [], []
        for handle, (submit, offset) in list(self._live.items()):
            handles.append(handle)
            token_ids.append(self.tokens(submit, offset))
            self._live[handle] = (submit, offset + 1)
            if offset + 1 >= submit.sampling.max_tokens:
                del self._live[handle]
                ended.append(worker_pb2.RequestEnded(handle=handle, reason=common_pb2.FINISH_REASON_LENGTH))
        telemetry = common_pb2.StepTelemetry(
            step=self._steps, decodes=len(handles), step_s=self.step_s, running=len(handles)
        )
        top = [common_pb2.TokenLogprob(token_id=i, logprob=-1.0, rank=i + 1) for i in range(self.top_logprobs)]
        position = common_pb2.PositionLogprobs(top=top)
        logprobs = [worker_pb2.HandleLogprobs(handle=h, positions=[position]) for h in handles if top]
        self.send_step(
            logprobs=logprobs,
            handles=handles,
            token_counts=[1] * len(handles),
            token_ids=token_ids,
            ended=ended,
            telemetry=[telemetry],
        )


class _Servicer(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, worker: ScriptedWorker) -> None:
        self._worker = worker

    async def Attach(
        self, request_iterator: AsyncIterator[worker_pb2.AttachRequest], context: Any
    ) -> AsyncIterator[worker_pb2.AttachResponse]:
        async for response in self._worker.serve(request_iterator):
            yield response
