"""Log-probabilities in the two shapes of the OpenAI API."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ascendra import PositionLogprobs, TokenLogprob

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""
_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 4
"""No character of UTF-8 is spread over more tokens before its last one."""

Name = Callable[[int], str]


def mentioned_ids(positions: Sequence[PositionLogprobs]) -> list[int]:
    """Return every token id that occurs."""
    return [token.token_id for position in positions for token in (position.sampled, *position.top)]


class Speller:
    """Names the tokens of one completion, in order."""

    def __init__(self) -> None:
        self._before: deque[bytes] = deque(maxlen=_CONTEXT_TOKENS)

    def name_in(self, tokens: Mapping[int, bytes]) -> Name:
        """Return how a token at the next position is spelt."""
        return lambda token_id: token_text(tokens[token_id], tuple(self._before))

    def advance(self, token: bytes) -> None:
        """Go on to the next position."""
        self._before.append(token)


def token_text(token: bytes, before: Sequence[bytes]) -> str:
    """Return the text of a token after others.

    One that ends within a character is empty, and the one that completes it has the whole of it, as in vLLM.
    """
    text = _decoded(token)
    if not text.endswith(_REPLACEMENT):
        return text
    for count in range(1, len(before) + 1):
        context = before[-count:]
        whole = _decoded(b"".join(context) + token)
        if whole.endswith(_REPLACEMENT):
            continue
        while context and _decoded(context[-1]).endswith(_REPLACEMENT):
            context = context[:-1]
        return whole[len(_decoded(b"".join(context))) :]
    return ""


def id_name(token_id: int) -> str:
    """Return how a token is named by its id."""
    return f"token_id:{token_id}"


def chat_logprobs(position: PositionLogprobs, name: Name) -> dict[str, Any]:
    """Return the shape of /v1/chat/completions for one token."""
    top = [_chat_token(token, name) for token in position.top]
    return {"content": [{**_chat_token(position.sampled, name), "top_logprobs": top}]}


def text_logprobs(position: PositionLogprobs, name: Name, offset: int) -> dict[str, Any]:
    """Return the shape of /v1/completions for one token. `offset` is its place in the text, in characters."""
    return {
        "tokens": [name(position.sampled.token_id)],
        "token_logprobs": [_value(position.sampled)],
        "top_logprobs": [{name(token.token_id): _value(token) for token in (position.sampled, *position.top)}],
        "text_offset": [offset],
    }


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return log-probabilities of consecutive tokens as one."""
    return {key: [item for part in parts for item in part[key]] for key in parts[0]} if parts else None


def _decoded(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _chat_token(token: TokenLogprob, name: Name) -> dict[str, Any]:
    text = name(token.token_id)
    return {"token": text, "logprob": _value(token), "bytes": list(text.encode())}


def _value(token: TokenLogprob) -> float:
    return max(token.logprob, MIN_LOGPROB)
