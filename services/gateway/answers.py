"""Chunks of completions as the JSON of the OpenAI API: SSE events of a stream, or one answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from ascendra import Chunk, Finished, FinishReason, Usage
from services.gateway.logprobs import Speller, joined
from services.gateway.requests import GenerationRequest

DONE = b"data: [DONE]\n\n"
_FINISH_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.ERROR: "error",
}


@dataclass(slots=True)
class Choice:
    """What was received of one completion."""

    request_id: str
    echo: str = ""
    """Text to put before the completion."""
    prompt_token_ids: Sequence[int] = ()
    """Known when they are to be returned."""
    started: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    text_offset: int = 0
    """Characters of the tokens whose log-probabilities were sent."""
    speller: Speller = field(default_factory=Speller)
    finished: Finished | None = None
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return self.finished.usage if self.finished else Usage(self.prompt_tokens, 0, self.completion_tokens)


class Answer:
    """Turns chunks into the bytes of one HTTP answer."""

    def __init__(self, request: GenerationRequest, choices: Sequence[Choice], *, name: str, model: str, created: int):
        self._request = request
        self.choices = choices
        self._chat = request.kind == "chat"
        self._name = name
        self._model = model
        self._created = created
        self._head = self._header(stream=True)
        # A plain token is its text between two constants.
        head = b"data: " + orjson.dumps(self._head)[:-1] + b',"choices":[{"index":'
        content = b',"delta":{"content":' if self._chat else b',"text":'
        self._openings = [head + str(index).encode() + content for index in range(len(choices))]
        closing = (
            b'},"logprobs":null,"finish_reason":null}]' if self._chat else b',"logprobs":null,"finish_reason":null}]'
        )
        self._usage_closing = closing + b',"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}}\n\n'
        self._closing = closing + b"}\n\n"
        self._always_whole = request.return_token_ids

    def event(self, index: int, chunk: Chunk, logprobs: dict[str, Any] | None) -> bytes:
        """Return the SSE event of a chunk."""
        choice = self.choices[index]
        first, choice.started = not choice.started, True
        self._count(choice, chunk)
        if first or chunk.finished is not None or logprobs is not None or self._always_whole:
            return b"data: " + orjson.dumps(self._whole_event(index, chunk, logprobs, first)) + b"\n\n"
        text = orjson.dumps(chunk.text)
        if self._request.continuous_usage:
            prompt, completion = choice.prompt_tokens, choice.completion_tokens
            return self._openings[index] + text + self._usage_closing % (prompt, completion, prompt + completion)
        return self._openings[index] + text + self._closing

    def last_events(self) -> bytes:
        """Return what follows the chunks of all choices."""
        if not self._request.include_usage:
            return DONE
        return b"data: " + orjson.dumps({**self._head, "choices": [], "usage": self._usage()}) + b"\n\n" + DONE

    def keep(self, index: int, chunk: Chunk, logprobs: dict[str, Any] | None) -> None:
        """Keep a chunk for the whole answer."""
        choice = self.choices[index]
        self._count(choice, chunk)
        choice.texts.append(chunk.text)
        if logprobs is not None:
            choice.logprobs.append(logprobs)
        if self._request.return_token_ids:
            choice.token_ids.extend(chunk.token_ids)

    def whole(self) -> bytes:
        """Return the whole answer, from what was kept."""
        receipts = [receipt_json(choice) for choice in self.choices]
        body = {
            **self._header(stream=False),
            "choices": [self._whole_choice(index, choice) for index, choice in enumerate(self.choices)],
            "usage": self._usage(),
            "ascendra": receipts[0] if len(receipts) == 1 else {"choices": receipts},
        }
        if self._chat and self._request.return_token_ids:
            body["prompt_token_ids"] = list(self.choices[0].prompt_token_ids)
        return orjson.dumps(body)

    def _header(self, *, stream: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self._chat:
            kind = "chat.completion.chunk" if stream else "chat.completion"
        return {"id": self._name, "object": kind, "created": self._created, "model": self._model}

    def _count(self, choice: Choice, chunk: Chunk) -> None:
        choice.prompt_tokens = chunk.prompt_tokens or choice.prompt_tokens
        choice.completion_tokens += len(chunk.token_ids)
        choice.finished = chunk.finished

    def _whole_event(self, index: int, chunk: Chunk, logprobs: dict[str, Any] | None, first: bool) -> dict[str, Any]:
        choice = self.choices[index]
        shown: dict[str, Any] = {"index": index}
        if self._chat:
            shown["delta"] = {"role": "assistant", "content": chunk.text} if first else {"content": chunk.text}
        else:
            shown["text"] = choice.echo + chunk.text if first else chunk.text
        shown |= {"logprobs": logprobs, "finish_reason": None}
        event = {**self._head, "choices": [shown]}
        if self._request.return_token_ids:
            shown["token_ids"] = list(chunk.token_ids)
            if first:
                (event if self._chat else shown)["prompt_token_ids"] = list(choice.prompt_token_ids)
        if chunk.finished is not None:
            shown |= self._end(chunk.finished)
            event["ascendra"] = receipt_json(choice)
        if self._request.continuous_usage:
            event["usage"] = usage_json([choice.usage])
        return event

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text = choice.echo + "".join(choice.texts)
        shown: dict[str, Any] = {"index": index}
        if self._chat:
            shown["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            shown["text"] = text
        shown["logprobs"] = joined(choice.logprobs)
        if choice.finished is not None:
            shown |= self._end(choice.finished)
        if self._request.return_token_ids:
            shown["token_ids"] = choice.token_ids
            if not self._chat:
                shown["prompt_token_ids"] = list(choice.prompt_token_ids)
        return shown

    def _end(self, finished: Finished) -> dict[str, Any]:
        stop_reason: str | int | None = finished.stop_string or None
        if finished.stop_token_id in self._request.sampling.stop_token_ids:  # end-of-sequence has no reason of its own
            stop_reason = finished.stop_token_id
        return {"finish_reason": _FINISH_REASONS[finished.reason], "stop_reason": stop_reason}

    def _usage(self) -> dict[str, Any]:
        return usage_json([choice.usage for choice in self.choices], samples=self._request.n)


def usage_json(usages: Sequence[Usage], *, samples: int = 1) -> dict[str, Any]:
    """Return token counts of completions; every `samples` consecutive ones share their prompt, which counts once."""
    prompts = usages[::samples]
    prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_prompt_tokens for usage in prompts)},
    }


def receipt_json(choice: Choice) -> dict[str, Any]:
    """Return what was promised to a completion and what it got."""
    assert choice.finished is not None
    receipt = choice.finished.receipt
    return {
        "request_id": choice.request_id,
        "target": {"ttft_ms": receipt.target.ttft_ms, "tbt_ms": receipt.target.tbt_ms},
        "met": receipt.met,
        "ttft_met": receipt.ttft_met,
        "tbt_met": receipt.tbt_met,
        "ttft_ms": receipt.ttft_ms,
        "p99_gap_ms": receipt.p99_gap_ms,
        "max_gap_ms": receipt.max_gap_ms,
        "mean_gap_ms": receipt.mean_gap_ms,
        "pool": receipt.pool,
        "relegated": receipt.relegated,
        "seed": receipt.seed,
        "move_contract": receipt.move_contract,
        "attempts": [
            {
                "number": attempt.number,
                "worker_id": attempt.worker_id,
                "role": attempt.role,
                "reason": attempt.reason,
                "first_token_offset": attempt.first_token_offset,
                "moved_by": attempt.moved_by,
            }
            for attempt in receipt.attempts
        ],
    }


def receipt_headers(choice: Choice) -> dict[str, str]:
    """Return the receipt's main values as HTTP headers."""
    assert choice.finished is not None
    receipt = choice.finished.receipt
    headers = {
        "x-ascendra-slo-met": str(receipt.met).lower(),
        "x-ascendra-ttft-ms": f"{receipt.ttft_ms:.3f}",
        "x-ascendra-p99-gap-ms": f"{receipt.p99_gap_ms:.3f}",
    }
    if receipt.pool is not None:
        headers["x-ascendra-pool"] = receipt.pool
    return headers
