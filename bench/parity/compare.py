"""What of two answers must agree: statuses, texts, token ids, ends, usage, log-probabilities."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LOGPROB_TOLERANCE = 1e-3
_CHOICE_KEYS = ("index", "finish_reason", "stop_reason", "token_ids")


@dataclass(slots=True)
class Outcome:
    """An answer, whole or streamed, in one form."""

    status: int
    error_code: Any = None
    """`code` and `type` of an error."""
    choices: list[dict[str, Any]] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    event_usages: list[dict[str, Any]] = field(default_factory=list)
    """Usage in each event of a stream that had it, without the last one; ours must be among theirs."""


def outcome_of(status: int, content_type: str, text: str) -> Outcome:
    """Read an answer."""
    if content_type.startswith("text/event-stream"):
        blocks = [block.removeprefix("data: ") for block in text.split("\n\n") if block]
        if blocks[-1] != "[DONE]":
            raise ValueError(f"the stream ends with {blocks[-1][:200]!r}")
        return _streamed(status, [json.loads(block) for block in blocks[:-1]])
    body = json.loads(text)
    if status != 200:
        return Outcome(status, error_code=(body.get("error") or {}).get("type") is not None)
    choices = [_choice(choice) for choice in body["choices"]]
    if "prompt_token_ids" in body:  # of a chat
        choices[0]["prompt_token_ids"] = body["prompt_token_ids"]
    return Outcome(status, choices=choices, usage=_usage(body["usage"]))


def differences(ours: Outcome, theirs: Outcome) -> list[str]:
    """Return where two answers differ; empty when they agree."""
    found: list[str] = []
    _compare("", _plain(ours), _plain(theirs), found)
    # Some of theirs may be missing: tokens that wait for a reader share an event.
    found += [f".event_usages: only ours {usage}" for usage in ours.event_usages if usage not in theirs.event_usages]
    return found


def _streamed(status: int, events: list[dict[str, Any]]) -> Outcome:
    outcome = Outcome(status)
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        if "error" in event:
            raise ValueError(f"the stream failed: {event['error']}")
        if event.get("usage") is not None:
            if outcome.usage is not None:
                outcome.event_usages.append(outcome.usage)
            outcome.usage = _usage(event["usage"])
        for part in event["choices"]:
            _append(choices.setdefault(part["index"], {"index": part["index"]}), part)
        if event.get("prompt_token_ids") is not None:  # of a chat
            choices[0]["prompt_token_ids"] = event["prompt_token_ids"]
    outcome.choices = [_choice(choices[index]) for index in sorted(choices)]
    if outcome.choices and events[0].get("object") == "chat.completion.chunk":
        # The role comes with the first output or in an event of its own, which then has a usage.
        outcome.event_usages = [usage for usage in outcome.event_usages if usage["completion_tokens"]]
    return outcome


def _append(choice: dict[str, Any], part: dict[str, Any]) -> None:
    choice["text"] = choice.get("text", "") + _text(part, "delta")
    for key in ("finish_reason", "stop_reason"):
        choice[key] = part.get(key) if part.get(key) is not None else choice.get(key)
    if (role := part.get("delta", {}).get("role")) is not None:
        choice["role"] = role
    if part.get("token_ids") is not None:
        choice["token_ids"] = choice.get("token_ids", []) + part["token_ids"]
    if part.get("prompt_token_ids") is not None:
        choice["prompt_token_ids"] = part["prompt_token_ids"]
    if part.get("logprobs") is not None:
        known = choice.setdefault("logprobs", {})
        for key, values in part["logprobs"].items():
            known[key] = known.get(key, []) + values


def _choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {key: choice.get(key) for key in _CHOICE_KEYS}
    shown["text"] = choice["text"] if "text" in choice else _text(choice, "message")
    shown["prompt_token_ids"] = choice.get("prompt_token_ids")
    shown["role"] = choice.get("role") or choice.get("message", {}).get("role")
    shown["logprobs"] = choice.get("logprobs")
    return shown


def _text(choice: Mapping[str, Any], message: str) -> str:
    return (choice["text"] if "text" in choice else choice[message].get("content")) or ""


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    return {key: usage[key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {
        "status": outcome.status,
        "error": outcome.error_code,
        "choices": [_asked_for(choice) for choice in outcome.choices],
        "usage": outcome.usage,
    }


def _asked_for(choice: dict[str, Any]) -> dict[str, Any]:
    """Leave out the prompt's ids where none were asked for: a streamed echo of vllm has them all the same."""
    return choice if choice["token_ids"] is not None else {**choice, "prompt_token_ids": None}


def _compare(where: str, ours: Any, theirs: Any, found: list[str]) -> None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in dict.fromkeys([*theirs, *ours]):
            if key not in ours or key not in theirs:
                found.append(f"{where}.{key}: only {'theirs' if key in theirs else 'ours'}")
            else:
                _compare(f"{where}.{key}", ours[key], theirs[key], found)
    elif isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            found.append(f"{where}: {len(ours)} entries, theirs {len(theirs)}")
        for index, pair in enumerate(zip(ours, theirs, strict=False)):
            _compare(f"{where}[{index}]", *pair, found)
    elif isinstance(ours, float) or isinstance(theirs, float):
        if not _close(ours, theirs):
            found.append(f"{where}: {ours}, theirs {theirs}")
    elif ours != theirs:
        found.append(f"{where}: {_short(ours)}, theirs {_short(theirs)}")


def _close(ours: Any, theirs: Any) -> bool:
    if not isinstance(ours, (int, float)) or not isinstance(theirs, (int, float)):
        return False
    return math.isclose(ours, theirs, rel_tol=0, abs_tol=LOGPROB_TOLERANCE)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
