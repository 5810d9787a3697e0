"""`InferenceService`: Generate and Session, and the small calls around the tokenizer."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np

from ascendra.v1 import inference_pb2, inference_pb2_grpc
from services.common.access import current_caller
from services.common.errors import InvalidArgument
from services.common.tracing import Tracer
from services.router.config import RouterConfig
from services.router.dispatcher import Dispatcher
from services.router.ingress import CallInfo, Ingress
from services.router.mailbox import Mailbox
from services.router.relay import Relays
from services.router.session import Session
from services.router.text import TextCodec
from services.router.validation import Limits, check_chat, check_model, check_text

_MAX_DETOKENIZE = 1 << 20


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Serves clients."""

    def __init__(
        self,
        config: RouterConfig,
        codec: TextCodec,
        dispatcher: Dispatcher,
        relays: Relays,
        limits: Callable[[], Limits],
        closing: asyncio.Event,
        tracer: Tracer | None,
    ) -> None:
        """Prepare.

        Args:
            closing: set when sessions should end, with everything of them finished or given up.
            tracer: None while tracing is off.
        """
        self._config = config
        self._codec = codec
        self._dispatcher = dispatcher
        self._limits = limits
        self._closing = closing
        self._ingress = Ingress(config, codec, dispatcher, relays, limits, tracer)

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Stream one completion; a client that leaves, by whatever way, has its request aborted at the worker."""
        arrival_s = time.monotonic()
        mailbox = Mailbox(self._config.max_unread_tokens)
        live = await self._ingress.admit(request, mailbox, arrival_s, call_info(context))
        try:
            while True:
                pending = await mailbox.take()
                if pending.has_response:
                    yield pending.response()
                if pending.error is not None:
                    raise pending.error
                if pending.end is not None:
                    return
        finally:
            self._dispatcher.cancel(live)

    async def Session(
        self, request_iterator: AsyncIterator[inference_pb2.SessionRequest], context: Any
    ) -> AsyncIterator[inference_pb2.SessionResponse]:
        """Serve all requests of one client process."""
        session = Session(self._config, self._ingress, self._dispatcher, call_info(context), self._closing)
        async for response in session.run(request_iterator):
            yield response

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> inference_pb2.TokenizeResponse:
        """Return the ids of a text or a conversation."""
        limits = self._limits()
        check_model(request.model, limits.model_name)
        kind = request.WhichOneof("input")
        if kind is None:
            raise InvalidArgument("input: one of text and chat must be set")
        if kind == "text":
            check_text("text", request.text, limits.max_text_bytes)
            ids = await self._codec.encode(request.text, special_tokens=not request.skip_special_tokens)
        else:
            check_chat(request.chat, limits.max_text_bytes)
            messages = [{"role": entry.role, "content": entry.content} for entry in request.chat.messages]
            ids = await self._codec.encode_chat(messages, continue_final=request.chat.continue_final_message)
        return inference_pb2.TokenizeResponse(
            token_ids=np.frombuffer(ids, dtype="<u4").tolist(), max_model_len=limits.max_model_len
        )

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Any
    ) -> inference_pb2.DetokenizeResponse:
        """Return the text of ids."""
        limits = self._limits()
        check_model(request.model, limits.model_name)
        if len(request.token_ids) > _MAX_DETOKENIZE:
            raise InvalidArgument(f"token_ids must hold at most {_MAX_DETOKENIZE}, got {len(request.token_ids)}")
        text = await asyncio.to_thread(self._codec.decode, request.token_ids)
        pieces = []
        if request.separately:
            pieces = await asyncio.to_thread(lambda: [self._codec.token_bytes(one) for one in request.token_ids])
        return inference_pb2.DetokenizeResponse(text=text, token_bytes=pieces)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        """Return the served model."""
        limits = self._limits()
        workers = sum(link.attached for link in self._dispatcher.links())
        model = inference_pb2.Model(name=limits.model_name, max_model_len=limits.max_model_len, workers=workers)
        return inference_pb2.ListModelsResponse(models=[model])


def call_info(context: Any) -> CallInfo:
    """Return what came beside a call."""
    metadata = {
        key: value
        for key, value in context.invocation_metadata() or ()
        if isinstance(value, str) and key != "authorization"
    }
    remaining_s = context.time_remaining()
    return CallInfo(metadata, max(remaining_s, 0.001) if remaining_s is not None else 0.0, current_caller())
