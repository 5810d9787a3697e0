"""An HTTP request to generate, as the requests that go to a router."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ascendra import Message, RequestOptions, SamplingParams, Slo
from services.gateway.config import GatewayConfig
from services.gateway.fields import Fields
from services.gateway.problems import BadRequest
from services.gateway.sampling import UINT64_RANGE, refuse_unsupported, sampling_of

TTFT_HEADERS = ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms")
TBT_HEADERS = ("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to complete: exactly one of the three."""

    text: str | None = None
    messages: Sequence[Message] | None = None
    token_ids: Sequence[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A parsed body. Choice i is sample i % n of prompt i // n."""

    kind: Literal["chat", "text"]
    model: str
    """As asked for; may be empty."""
    prompts: Sequence[Prompt]
    n: int
    sampling: SamplingParams
    options: RequestOptions = field(default_factory=lambda: RequestOptions())
    """What every choice shares beside model, prompt and sampling."""
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    """Put the prompt before the completion."""
    echo_only: bool = False
    """Return the prompt alone: one token is generated and not shown."""
    add_special_tokens: bool = True
    """Let the tokenizer add its special tokens to a text prompt."""
    tokens_as_ids: bool = False
    """Name tokens "token_id:N" in log-probabilities."""
    return_token_ids: bool = False
    """Return the ids of prompt and completion; an echo then leaves the prompt's text out."""

    @property
    def choices(self) -> int:
        """Number of completions."""
        return len(self.prompts) * self.n

    def choice_options(self, index: int, request_id: str) -> RequestOptions:
        """Return the options of one choice's request, without its prompt."""
        sampling = self.sampling
        sample = index % self.n
        if sample and sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + sample) % UINT64_RANGE)
        options: RequestOptions = {
            **self.options,
            "sampling": sampling,
            "request_id": self.choice_id(index, request_id),
        }
        if self.model:
            options["model"] = self.model
        return options

    def choice_id(self, index: int, request_id: str) -> str:
        """Return the id under which the router knows a choice."""
        return request_id if self.choices == 1 else f"{request_id}-{index}"


def parse_completion(body: Fields, headers: Mapping[str, str], config: GatewayConfig) -> GenerationRequest:
    """Return the request of a body of /v1/completions. Raises BadRequest."""
    max_tokens, echo = body.integer("max_tokens"), body.flag("echo")
    echo_only = echo and max_tokens == 0
    sampling = sampling_of(
        body,
        max_tokens=config.completion_max_tokens if max_tokens is None else 1 if echo_only else max_tokens,
        logprobs=body.integer("logprobs"),
    )
    return _parse(
        body,
        headers,
        config,
        kind="text",
        prompts=_prompts(body.get("prompt")),
        sampling=sampling,
        echo=echo,
        echo_only=echo_only,
        add_special_tokens=body.flag("add_special_tokens", True),
    )


def parse_chat(body: Fields, headers: Mapping[str, str], config: GatewayConfig) -> GenerationRequest:
    """Return the request of a body of /v1/chat/completions. Raises BadRequest."""
    top_logprobs = body.integer("top_logprobs") or 0
    logprobs = top_logprobs if body.flag("logprobs") else None
    if top_logprobs and logprobs is None:
        raise BadRequest("top_logprobs", "is only allowed with logprobs")
    max_tokens = body.integer("max_completion_tokens")
    sampling = sampling_of(
        body, max_tokens=body.integer("max_tokens") if max_tokens is None else max_tokens, logprobs=logprobs
    )
    continue_final = continues_final(body)
    if body.flag("echo"):
        raise BadRequest("echo", "is not supported here")
    request = _parse(
        body,
        headers,
        config,
        kind="chat",
        prompts=[Prompt(messages=parse_messages(body.get("messages")))],
        sampling=sampling,
    )
    if continue_final:
        request.options["continue_final_message"] = True
    return request


def continues_final(body: Fields) -> bool:
    """Return whether the model goes on with the last message. Raises BadRequest."""
    continue_final = body.flag("continue_final_message")
    if body.flag("add_generation_prompt", True) == continue_final and "add_generation_prompt" in body.values:
        raise BadRequest("add_generation_prompt", "must be the opposite of continue_final_message")
    return continue_final


def parse_messages(given: Any) -> list[Message]:
    """Return a conversation; content parts must be text. Raises BadRequest."""
    if not isinstance(given, list) or not given:
        raise BadRequest("messages", "expected a list with at least one message")
    messages = []
    for index, item in enumerate(given):
        where = f"messages[{index}]"
        if not isinstance(item, dict):
            raise BadRequest(where, "expected an object")
        message = Fields(item, prefix=f"{where}.")
        role = message.text("role")
        if not role:
            raise BadRequest(f"{where}.role", "is missing")
        if message.get("tool_calls"):
            raise BadRequest(f"{where}.tool_calls", "is not supported")
        messages.append(Message(role, _content(message.get("content"), f"{where}.content")))
    return messages


def _content(given: Any, where: str) -> str:
    if given is None or isinstance(given, str):
        return given or ""
    if not isinstance(given, list):
        raise BadRequest(where, "expected a string or a list of parts")
    texts = []
    for index, part in enumerate(given):
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise BadRequest(f"{where}[{index}]", "only text parts are supported")
    return "\n".join(texts)


def _prompts(given: Any) -> list[Prompt]:
    if isinstance(given, str):
        return [Prompt(text=given)]
    if isinstance(given, list) and given:
        if all(isinstance(item, str) for item in given):
            return [Prompt(text=item) for item in given]
        if _is_token_ids(given):
            return [Prompt(token_ids=given)]
        if all(isinstance(item, list) and item and _is_token_ids(item) for item in given):
            return [Prompt(token_ids=item) for item in given]
    raise BadRequest("prompt", "expected a string, a list of token ids, or a list of either")


def _is_token_ids(given: list[Any]) -> bool:
    return all(type(item) is int for item in given)


def _parse(
    body: Fields,
    headers: Mapping[str, str],
    config: GatewayConfig,
    *,
    kind: Literal["chat", "text"],
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    echo: bool = False,
    echo_only: bool = False,
    add_special_tokens: bool = True,
) -> GenerationRequest:
    refuse_unsupported(body)
    if echo and sampling.logprobs is not None:
        raise BadRequest("echo", "log-probabilities of the prompt are not supported")
    n = body.integer("n")
    n = 1 if n is None else n
    if n < 1 or n * len(prompts) > config.max_choices:
        raise BadRequest("n", f"prompts times n must be from 1 to {config.max_choices}")
    stream = body.flag("stream")
    stream_options = body.object("stream_options") or Fields({})
    if stream_options.values and not stream:
        raise BadRequest("stream_options", "is only allowed with stream")
    continuous_usage = stream_options.flag("continuous_usage_stats")
    return GenerationRequest(
        kind=kind,
        model=body.text("model") or "",
        prompts=prompts,
        n=n,
        sampling=sampling,
        options=_options(body, headers),
        stream=stream,
        include_usage=stream_options.flag("include_usage"),
        continuous_usage=continuous_usage,
        echo=echo,
        echo_only=echo_only,
        add_special_tokens=add_special_tokens,
        tokens_as_ids=body.flag("return_tokens_as_token_ids"),
        return_token_ids=body.flag("return_token_ids"),
    )


def _options(body: Fields, headers: Mapping[str, str]) -> RequestOptions:
    options = RequestOptions()
    slo = body.object("slo") or Fields({})
    ttft_ms, tbt_ms = slo.number("ttft_ms"), slo.number("tbt_ms")
    if ttft_ms is None:
        ttft_ms = _header_ms(headers, TTFT_HEADERS)
    if tbt_ms is None:
        tbt_ms = _header_ms(headers, TBT_HEADERS)
    if ttft_ms is not None or tbt_ms is not None:
        options["slo"] = Slo(ttft_ms=ttft_ms, tbt_ms=tbt_ms)
    if slo_class := body.text("slo_class"):
        options["slo_class"] = slo_class
    if (priority := body.integer("priority")) is not None:
        options["priority"] = priority
    if on_overload := body.text("on_overload"):
        if on_overload not in ("relegate", "refuse"):
            raise BadRequest("on_overload", "must be relegate or refuse")
        options["on_overload"] = "refuse" if on_overload == "refuse" else "relegate"
    if session_id := headers.get("x-session-id") or body.text("session_id"):
        options["session_id"] = session_id
    if traceparent := headers.get("traceparent"):
        options["traceparent"] = traceparent
    return options


def _header_ms(headers: Mapping[str, str], names: Sequence[str]) -> float | None:
    for name in names:
        if (text := headers.get(name)) is not None:
            try:
                return float(text)
            except ValueError:
                raise BadRequest(name, "expected a number of milliseconds") from None
    return None
