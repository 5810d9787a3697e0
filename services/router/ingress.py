"""From a client's message to a live request: checks, defaults, tokens, objective, contract."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc

from ascendra.v1 import common_pb2, inference_pb2
from services.common.access import ANYBODY, Caller, read_key
from services.common.errors import InvalidArgument, ServiceError
from services.common.tracing import Tracer
from services.router import metrics
from services.router.config import RouterConfig
from services.router.contract import move_contract
from services.router.dispatcher import Dispatcher
from services.router.mailbox import Sink
from services.router.quotas import Pass, Quotas
from services.router.relay import Relays
from services.router.request import LiveRequest, RequestSpec
from services.router.resume import Cursor, read_cursor, received_tokens, replay_text, write_cursor
from services.router.text import TextCodec, TextStream
from services.router.tracing import RequestTrace
from services.router.validation import (
    Limits,
    check_ids,
    check_request,
    objective,
    stop_strings,
    token_limits,
)

_HEADER_TTFT = ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms")
_HEADER_TBT = ("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms")
_TRACEPARENT = "traceparent"


class AlreadyExists(ServiceError):
    """A request with this id is being served."""


@dataclass(frozen=True, slots=True)
class CallInfo:
    """What came beside the message."""

    metadata: Mapping[str, str]
    timeout_s: float = 0.0
    """Time left of the call's own deadline; 0: none."""
    caller: Caller = ANYBODY


class Ingress:
    """Makes requests live."""

    def __init__(
        self,
        config: RouterConfig,
        codec: TextCodec,
        dispatcher: Dispatcher,
        relays: Relays,
        limits: Callable[[], Limits],
        tracer: Tracer | None = None,
    ) -> None:
        self._config = config
        self._tracer = tracer
        self._codec = codec
        self._dispatcher = dispatcher
        self._relays = relays
        self._limits = limits
        self._quotas = Quotas(config.quota, config.tenants)
        self._resume_key = read_key(config.resume_key_file).encode()

    async def admit(
        self, message: inference_pb2.GenerateRequest, sink: Sink, arrival_s: float, call: CallInfo
    ) -> LiveRequest:
        """Check, tokenize and start a request; its stream goes to `sink`, beginning with `accepted`.

        Raises:
            ServiceError: it was refused; `sink` heard nothing.
        """
        trace = None
        traceparent = message.traceparent or call.metadata.get(_TRACEPARENT, "")
        if self._tracer is not None:
            trace = RequestTrace(self._tracer, message, self._limits().model_name, traceparent, arrival_s)
        try:
            return await self._admit(message, sink, arrival_s, call, traceparent, trace)
        except ServiceError as error:
            metrics.refused(error)
            if trace is not None:
                trace.refused(error)
            raise

    async def _admit(
        self,
        message: inference_pb2.GenerateRequest,
        sink: Sink,
        arrival_s: float,
        call: CallInfo,
        traceparent: str,
        trace: RequestTrace | None,
    ) -> LiveRequest:
        _apply_metadata(message, call.metadata)
        message.tenant = call.caller.tenant(message.tenant)
        limits = self._limits()
        check_request(message, limits)
        admitted = self._quotas.enter(message.tenant)
        try:
            return await self._start(message, limits, admitted, sink, arrival_s, call, traceparent, trace)
        except BaseException:
            admitted.close()
            raise

    async def _start(
        self,
        message: inference_pb2.GenerateRequest,
        limits: Limits,
        admitted: Pass,
        sink: Sink,
        arrival_s: float,
        call: CallInfo,
        traceparent: str,
        trace: RequestTrace | None,
    ) -> LiveRequest:
        class_name, slo_class, slo = objective(message, self._config.slo_classes, self._config.tenants)
        request_id = message.request_id or f"req-{secrets.token_hex(8)}"
        if request_id in self._dispatcher.live:
            raise _in_use(request_id)
        prompt = await self._prompt(message)
        check_ids("tokens.token_ids", prompt, limits)
        sampling = common_pb2.SamplingParameters()
        sampling.CopyFrom(message.sampling)
        for parameter, recommended in self._codec.sampling_defaults.items():
            if not sampling.HasField(parameter):
                setattr(sampling, parameter, recommended)
        sampling.max_tokens = token_limits(sampling, len(prompt) // 4, limits)
        if not sampling.HasField("seed"):
            sampling.seed = secrets.randbits(63)
        contract, why = move_contract(sampling, self._dispatcher.usable())
        refuse = message.on_overload == inference_pb2.OVERLOAD_ACTION_REFUSE or (
            message.on_overload == inference_pb2.OVERLOAD_ACTION_UNSPECIFIED and slo_class.on_overload == "refuse"
        )
        text = None
        if not message.tokens_only:
            text = TextStream(
                self._codec.decoder(),
                stop_strings(sampling),
                min_tokens=sampling.min_tokens,
                include_stop=sampling.include_stop_in_output,
            )
        del sampling.stop[:]
        spec = RequestSpec(
            request_id=request_id,
            prompt=prompt,
            sampling=sampling,
            slo=slo,
            slo_class=class_name,
            priority=message.priority,
            tenant=message.tenant,
            session_id=message.session_id,
            traceparent=traceparent,
            timeout_s=_shortest(message.timeout_ms / 1000, call.timeout_s) or self._config.default_timeout_s,
            refuse_hopeless=refuse,
            contract=contract,
            contract_reason=why,
        )
        if request_id in self._dispatcher.live:  # another one may have come while this was being tokenized
            raise _in_use(request_id)
        received_count = len(message.resume.token_ids) // 4
        if message.sinks:
            sink = self._relays.mirror(message.sinks, request_id, received_count, sink)
        sink = admitted.metered(sink, received_count)
        if message.HasField("resume"):
            return self._resume(message.resume, spec, arrival_s, text, sink, limits, admitted, trace)
        admitted.reserve(spec.prompt_tokens, sampling.max_tokens)
        request = LiveRequest(spec, arrival_s, text, sink)
        _follow(request, trace)
        self._dispatcher.start(request)
        sink.accepted(self._accepted(spec))
        return request

    async def _prompt(self, message: inference_pb2.GenerateRequest) -> bytes:
        kind = message.WhichOneof("prompt")
        if kind == "tokens":
            return message.tokens.token_ids
        with metrics.TOKENIZE_SECONDS.time():
            if kind == "text":
                return await self._codec.encode(message.text)
            messages = [{"role": entry.role, "content": entry.content} for entry in message.chat.messages]
            return await self._codec.encode_chat(messages, continue_final=message.chat.continue_final_message)

    def _resume(
        self,
        resume: inference_pb2.Resume,
        spec: RequestSpec,
        arrival_s: float,
        text: TextStream | None,
        sink: Sink,
        limits: Limits,
        admitted: Pass,
        trace: RequestTrace | None,
    ) -> LiveRequest:
        if spec.pinned:
            raise InvalidArgument(f"resume: the request is pinned: {spec.contract_reason}", reason="PINNED")
        chosen = read_cursor(resume.cursor, spec.prompt, spec.tenant, self._resume_key)
        spec.sampling.seed, spec.sampling.max_tokens = chosen.seed, chosen.max_tokens
        # Whoever made the cursor: it may ask for nothing that the request itself may not.
        spec.sampling.max_tokens = token_limits(spec.sampling, spec.prompt_tokens, limits)
        received = received_tokens(resume, limits)
        if len(received) > chosen.max_tokens:
            raise InvalidArgument(f"resume.token_ids hold {len(received)}, more than max_tokens {chosen.max_tokens}")
        admitted.reserve(spec.prompt_tokens, spec.sampling.max_tokens)
        unread = replay_text(text, received, resume.text_bytes) if text is not None else ""
        request = LiveRequest(spec, arrival_s, text, sink, received)
        _follow(request, trace)
        reason = self._complete(request, received)
        if reason is None:
            self._dispatcher.start(request)
        sink.accepted(self._accepted(spec))
        if unread:
            sink.tokens(len(received), (), unread)
        if reason is not None:
            last, finished = request.finish(reason)
            sink.finished(last, finished)
            if trace is not None:
                trace.ends(request, "finished")
        return request

    def _accepted(self, spec: RequestSpec) -> inference_pb2.Accepted:
        resume = b""
        if not spec.pinned:
            chosen = Cursor(spec.sampling.seed, spec.sampling.max_tokens)
            resume = write_cursor(chosen, spec.prompt, spec.tenant, self._resume_key)
        return inference_pb2.Accepted(
            request_id=spec.request_id,
            resume_cursor=resume,
            prompt_tokens=spec.prompt_tokens,
            move_contract=spec.contract,
            move_contract_reason=spec.contract_reason,
        )

    def _complete(self, request: LiveRequest, received: list[int]) -> "common_pb2.FinishReason | None":
        """Return why a resumed request has nothing left to generate, if so: only its last message was lost."""
        sampling = request.spec.sampling
        if request.text is not None and request.text.finished:
            return common_pb2.FINISH_REASON_STOP
        if received and len(received) >= sampling.min_tokens:
            ended = received[-1] in self._codec.eos_token_ids and not sampling.ignore_eos
            if ended or received[-1] in sampling.stop_token_ids:
                return common_pb2.FINISH_REASON_STOP
        return common_pb2.FINISH_REASON_LENGTH if len(received) >= sampling.max_tokens else None


def _follow(request: LiveRequest, trace: RequestTrace | None) -> None:
    if trace is not None:
        request.trace = trace
        trace.checked(request.spec, request.resumed_tokens)


def _in_use(request_id: str) -> AlreadyExists:
    return AlreadyExists(
        f"request_id {request_id!r} is being served", reason="REQUEST_ID_IN_USE", code=grpc.StatusCode.ALREADY_EXISTS
    )


def _shortest(*limits_s: float) -> float:
    return min((limit_s for limit_s in limits_s if limit_s > 0), default=0.0)


def _apply_metadata(message: inference_pb2.GenerateRequest, metadata: Mapping[str, str]) -> None:
    """Fill in what the message leaves out from the call's metadata."""
    if not message.request_id:
        message.request_id = metadata.get("x-request-id", "")
    if not message.session_id:
        message.session_id = metadata.get("x-session-id", "")
    for field, keys in (("ttft_ms", _HEADER_TTFT), ("tbt_ms", _HEADER_TBT)):
        value = next((metadata[key] for key in keys if key in metadata), None)
        if value is None or getattr(message.slo, field):
            continue
        try:
            number = float(value)
        except ValueError:
            raise InvalidArgument(f"metadata {keys[0]} must be a number of milliseconds, got {value[:32]!r}") from None
        if not number > 0:
            raise InvalidArgument(f"metadata {keys[0]} must be above 0, got {value[:32]!r}")
        setattr(message.slo, field, number)
