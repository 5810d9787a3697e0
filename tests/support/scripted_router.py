"""A router that plays a script over a real socket: what a client may meet, including every fault."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from ascendra.v1 import cluster_pb2, cluster_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc
from services.common import errors
from services.common.grpc_server import GrpcServer, start_grpc_server

CURSOR = b"cursor"


@dataclass(frozen=True, slots=True)
class Fail:
    """End the request with an error."""

    error: errors.ServiceError


@dataclass(frozen=True, slots=True)
class Break:
    """Break the connection, as a router that dies."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class EndWithoutFinish:
    """End the stream as if all were well, without an end message."""


Step = inference_pb2.GenerateResponse | Fail | Break | Pause | EndWithoutFinish
Script = Callable[[inference_pb2.GenerateRequest], Sequence[Step]]
"""Given a request, what to do."""


def accepted(request: inference_pb2.GenerateRequest, *, cursor: bytes = CURSOR) -> inference_pb2.GenerateResponse:
    """Return the first message of a stream."""
    return inference_pb2.GenerateResponse(
        accepted=inference_pb2.Accepted(
            request_id=request.request_id,
            resume_cursor=cursor,
            prompt_tokens=3,
            move_contract=common_pb2.MOVE_CONTRACT_EXACT,
        )
    )


def tokens(offset: int, *ids: int, text: str | None = None) -> inference_pb2.GenerateResponse:
    """Return a message with tokens; their text is the ids between blanks unless given."""
    shown = "".join(f" {token_id}" for token_id in ids) if text is None else text
    return inference_pb2.GenerateResponse(token_offset=offset, token_ids=ids, text=shown)


def finished(completion_tokens: int, *, text: str = "") -> inference_pb2.GenerateResponse:
    """Return the last message of a stream."""
    return inference_pb2.GenerateResponse(
        token_offset=completion_tokens,
        text=text,
        finished=inference_pb2.Finished(
            reason=common_pb2.FINISH_REASON_LENGTH,
            usage=common_pb2.Usage(prompt_tokens=3, completion_tokens=completion_tokens),
            receipt=inference_pb2.SloReceipt(
                target=common_pb2.Slo(ttft_ms=500, tbt_ms=50),
                ttft_ms=12.5,
                p99_gap_ms=60,
                ttft_met=True,
                tbt_met=False,
                pool=common_pb2.ROLE_HIGH_PRIORITY,
                attempts=[
                    inference_pb2.Attempt(number=1, worker_id="w0", role=common_pb2.ROLE_LOW_PRIORITY, reason="placed"),
                    inference_pb2.Attempt(
                        number=2, worker_id="w1", role=common_pb2.ROLE_HIGH_PRIORITY, reason="offloaded: laxity"
                    ),
                ],
                seed=7,
                move_contract=common_pb2.MOVE_CONTRACT_EXACT,
            ),
        ),
    )


def counting(count: int, *, pause_s: float = 0.0) -> Script:
    """Return a script that yields the tokens 0, 1, 2, ... one a message, continuing a resumed stream."""

    def script(request: inference_pb2.GenerateRequest) -> list[Step]:
        start = len(request.resume.token_ids) // 4
        steps: list[Step] = [accepted(request)]
        for offset in range(start, count):
            if pause_s:
                steps.append(Pause(pause_s))
            steps.append(tokens(offset, offset))
        return [*steps, finished(count)]

    return script


def in_order(*scripts: Script) -> Script:
    """Return a script whose n-th request follows the n-th script, and the last one from then on."""
    left = list(scripts)
    return lambda request: (left.pop(0) if len(left) > 1 else left[0])(request)


def always(*steps: Step) -> Script:
    """Return a script that is the same for every request, after an `accepted`."""
    return lambda request: [accepted(request), *steps]


def resumed_ids(request: inference_pb2.GenerateRequest) -> tuple[int, ...]:
    """Return the token ids that a resuming client says it has."""
    return struct.unpack(f"<{len(request.resume.token_ids) // 4}I", request.resume.token_ids)


@dataclass
class ScriptedRouter(inference_pb2_grpc.InferenceServiceServicer, cluster_pb2_grpc.ClusterServiceServicer):
    """The service; `script` may be changed while it runs."""

    script: Script
    requests: list[inference_pb2.GenerateRequest] = field(default_factory=list)
    """Copies of the requests that arrived."""
    metadata: list[dict[str, str]] = field(default_factory=list)
    """Metadata of the calls that carried requests."""
    cancelled: list[str] = field(default_factory=list)
    """Ids of requests that the client gave up."""
    completed: list[str] = field(default_factory=list)
    """Ids of requests whose script ran to its end."""
    sessions: int = 0
    """Sessions opened so far."""
    time_remaining_s: list[float] = field(default_factory=list)
    """Time left to the gRPC deadline when a Generate call arrived, in seconds."""
    status_pause_s: float = 0.0
    """Time that a status takes, in seconds."""
    address: str = ""
    _server: GrpcServer | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, listen: str = "127.0.0.1:0") -> None:
        """Serve."""

        def register(server: grpc.aio.Server) -> list[str]:
            inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, server)
            cluster_pb2_grpc.add_ClusterServiceServicer_to_server(self, server)
            return ["ascendra.v1.InferenceService", "ascendra.v1.ClusterService"]

        self._server = await start_grpc_server(listen, register)
        self.address = self._server.address

    async def stop(self) -> None:
        """Stop at once, breaking what is in flight."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(0)

    async def until(self, condition: Callable[["ScriptedRouter"], bool], timeout_s: float = 10.0) -> None:
        """Wait for something that requests change. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition(self):
                self._changed.clear()
                await self._changed.wait()

    async def until_cancelled(self, request_id: str) -> None:
        """Wait for the client to give a request up. Raises TimeoutError."""
        await self.until(lambda router: request_id in router.cancelled)

    # InferenceService

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Play the script of a request."""
        self.metadata.append(dict(context.invocation_metadata()))
        self.time_remaining_s.append(context.time_remaining())
        async with contextlib.aclosing(self._play(request)) as steps:
            async for step in steps:
                if isinstance(step, Fail):
                    raise step.error
                if isinstance(step, Break):
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
                if isinstance(step, inference_pb2.GenerateResponse):
                    yield step

    async def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[inference_pb2.SessionResponse]:
        """Play the scripts of many requests."""
        self.sessions += 1
        self.metadata.append(dict(context.invocation_metadata()))
        outbox: asyncio.Queue[inference_pb2.SessionResponse | None] = asyncio.Queue()
        running: dict[int, asyncio.Task[None]] = {}

        async def read() -> None:
            async for message in request_iterator:
                if message.HasField("start"):
                    start = message.start
                    running[start.handle] = asyncio.create_task(self._play_in_session(start, outbox))
                elif message.cancel.handle in running:
                    running[message.cancel.handle].cancel()
            outbox.put_nowait(inference_pb2.SessionResponse())

        reader = asyncio.create_task(read())
        try:
            while (response := await outbox.get()) is not None:
                yield response
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        finally:
            tasks = [reader, *running.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> inference_pb2.TokenizeResponse:
        """Return one id for each character."""
        text = request.text or "".join(message.content for message in request.chat.messages)
        return inference_pb2.TokenizeResponse(token_ids=[ord(character) for character in text], max_model_len=2048)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Any
    ) -> inference_pb2.DetokenizeResponse:
        """Return one character for each id."""
        characters = [chr(token_id) for token_id in request.token_ids]
        pieces = [character.encode() for character in characters] if request.separately else []
        return inference_pb2.DetokenizeResponse(text="".join(characters), token_bytes=pieces)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        """Return one model."""
        return inference_pb2.ListModelsResponse(
            models=[inference_pb2.Model(name="tiny", max_model_len=2048, workers=2)]
        )

    # ClusterService

    async def GetStatus(self, request: cluster_pb2.GetStatusRequest, context: Any) -> cluster_pb2.GetStatusResponse:
        """Return two workers."""
        await asyncio.sleep(self.status_pause_s)
        return self._status()

    async def WatchStatus(
        self, request: cluster_pb2.WatchStatusRequest, context: Any
    ) -> AsyncIterator[cluster_pb2.WatchStatusResponse]:
        """Return the status again and again."""
        while True:
            yield cluster_pb2.WatchStatusResponse(status=self._status())
            await asyncio.sleep(request.interval_ms / 1000)

    async def RegisterWorker(
        self, request: cluster_pb2.RegisterWorkerRequest, context: Any
    ) -> cluster_pb2.RegisterWorkerResponse:
        """Refuse: the workers are part of the script."""
        raise errors.InvalidArgument("address: this router's workers are fixed")

    async def SetRole(self, request: cluster_pb2.SetRoleRequest, context: Any) -> cluster_pb2.SetRoleResponse:
        """Accept any role for the workers of the status."""
        self._check_worker(request.worker_id)
        return cluster_pb2.SetRoleResponse(role=request.role)

    async def DrainWorker(
        self, request: cluster_pb2.DrainWorkerRequest, context: Any
    ) -> cluster_pb2.DrainWorkerResponse:
        """Say that three requests remain."""
        self._check_worker(request.worker_id)
        return cluster_pb2.DrainWorkerResponse(remaining=3)

    async def Explain(self, request: cluster_pb2.ExplainRequest, context: Any) -> cluster_pb2.ExplainResponse:
        """Explain the requests that this router served."""
        if request.request_id not in self.completed:
            raise errors.NotFound(f"request_id: {request.request_id} is not known")
        return cluster_pb2.ExplainResponse(
            request_id=request.request_id,
            state="finished",
            decisions=[
                cluster_pb2.Decision(
                    at_ms=0.4,
                    kind="place",
                    rule="least predicted work",
                    to_worker_id="w0",
                    predicted_ttft_s=0.12,
                    candidates=[
                        cluster_pb2.Candidate(worker_id="w0", predicted_ttft_s=0.12, miss_ttft=0.01),
                        cluster_pb2.Candidate(worker_id="w1", excluded="high priority"),
                    ],
                ),
                cluster_pb2.Decision(
                    at_ms=88, kind="offload", rule="laxity below margin", from_worker_id="w0", to_worker_id="w1"
                ),
            ],
            receipt=finished(3).finished.receipt,
        )

    # Playing

    async def _play(self, request: inference_pb2.GenerateRequest) -> AsyncGenerator[Step]:
        copy = inference_pb2.GenerateRequest()
        copy.CopyFrom(request)
        self.requests.append(copy)
        self._changed.set()
        try:
            for step in self.script(request):
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                elif isinstance(step, EndWithoutFinish):
                    return
                else:
                    yield step
            self.completed.append(request.request_id)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(request.request_id)
            self._changed.set()
            raise

    async def _play_in_session(
        self, start: inference_pb2.SessionStart, outbox: "asyncio.Queue[inference_pb2.SessionResponse | None]"
    ) -> None:
        handle = start.handle
        async with contextlib.aclosing(self._play(start.request)) as steps:
            async for step in steps:
                if isinstance(step, Break):
                    outbox.put_nowait(None)
                    return
                outbox.put_nowait(_session_response(handle, step))

    def _check_worker(self, worker_id: str) -> None:
        known = [worker.worker_id for worker in self._status().workers]
        if worker_id not in known:
            raise errors.NotFound(f"worker_id: no worker {worker_id!r}; workers: {', '.join(known)}")

    def _status(self) -> cluster_pb2.GetStatusResponse:
        return cluster_pb2.GetStatusResponse(
            router_id="router-0",
            version="0.1.0",
            workers=[
                cluster_pb2.WorkerStatus(
                    worker_id="w0",
                    address="127.0.0.1:7200",
                    health=cluster_pb2.WORKER_HEALTH_READY,
                    role=common_pb2.ROLE_LOW_PRIORITY,
                    model="tiny",
                    engine="emulated",
                    waiting=4,
                    running=2,
                    queued_prefill_tokens=1200,
                    kv_usage=0.25,
                    predicted_ttft_s=0.21,
                    policy="llf dynamic moore_hodgson",
                ),
                cluster_pb2.WorkerStatus(
                    worker_id="w1",
                    address="127.0.0.1:7201",
                    health=cluster_pb2.WORKER_HEALTH_CONNECTING,
                    role=common_pb2.ROLE_HIGH_PRIORITY,
                    model="tiny",
                    engine="emulated",
                ),
            ],
            attainment=[
                cluster_pb2.AttainmentStatus(
                    slo_class="default", requests=20, joint=0.95, ttft=1, tbt=0.95, ttft_p50_s=0.1, ttft_p99_s=0.4
                )
            ],
            window_s=60,
            live_requests=6,
            prediction_policy="worker_model",
            counters={"offloads": 3},
            uptime_s=12,
        )


@contextlib.asynccontextmanager
async def serve(script: Script, listen: str = "127.0.0.1:0") -> AsyncIterator[ScriptedRouter]:
    """Run a scripted router."""
    router = ScriptedRouter(script)
    await router.start(listen)
    try:
        yield router
    finally:
        await router.stop()


def _session_response(handle: int, step: Step) -> inference_pb2.SessionResponse:
    if isinstance(step, Fail):
        error = step.error
        return inference_pb2.SessionResponse(
            errors=[
                inference_pb2.SessionError(
                    handle=handle,
                    code=error.code.value[0],
                    message=error.message,
                    reason=error.reason,
                    retry_safe=error.retry_safe,
                    retry_after_ms=error.retry_after_ms,
                )
            ]
        )
    assert isinstance(step, inference_pb2.GenerateResponse)
    if step.HasField("accepted") or step.HasField("finished") or step.logprobs:
        return inference_pb2.SessionResponse(items=[inference_pb2.SessionItem(handle=handle, response=step)])
    columns = inference_pb2.SessionTokens(
        handles=[handle],
        token_offsets=[step.token_offset],
        token_counts=[len(step.token_ids)],
        token_ids=step.token_ids,
        texts=[step.text],
    )
    return inference_pb2.SessionResponse(tokens=columns)
