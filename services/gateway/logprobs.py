"""Log-probabilities in the two shapes of the OpenAI API."""

from collections.abc import Mapping, Sequence
from typing import Any

from ascendra import PositionLogprobs, TokenLogprob

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def mentioned_ids(positions: Sequence[PositionLogprobs]) -> list[int]:
    """Return every token id that occurs."""
    return [token.token_id for position in positions for token in (position.sampled, *position.top)]


def chat_logprobs(positions: Sequence[PositionLogprobs], texts: Mapping[int, str]) -> dict[str, Any]:
    """Return the shape of /v1/chat/completions."""
    content = [
        {**_chat_token(p.sampled, texts), "top_logprobs": [_chat_token(token, texts) for token in p.top]}
        for p in positions
    ]
    return {"content": content}


def text_logprobs(positions: Sequence[PositionLogprobs], texts: Mapping[int, str], offset: int) -> dict[str, Any]:
    """Return the shape of /v1/completions. `offset` is the place of the first token in the text, in characters."""
    offsets = []
    for position in positions:
        offsets.append(offset)
        offset += len(texts[position.sampled.token_id])
    return {
        "tokens": [texts[position.sampled.token_id] for position in positions],
        "token_logprobs": [_value(position.sampled) for position in positions],
        "top_logprobs": [
            {texts[token.token_id]: _value(token) for token in (position.sampled, *position.top)}
            for position in positions
        ],
        "text_offset": offsets,
    }


def text_length(positions: Sequence[PositionLogprobs], texts: Mapping[int, str]) -> int:
    """Return how far these tokens move the text offset."""
    return sum(len(texts[position.sampled.token_id]) for position in positions)


class IdNames(dict[int, str]):
    """Names every token "token_id:N"."""

    def __missing__(self, token_id: int) -> str:
        return f"token_id:{token_id}"


def _chat_token(token: TokenLogprob, texts: Mapping[int, str]) -> dict[str, Any]:
    text = texts[token.token_id]
    return {"token": text, "logprob": _value(token), "bytes": list(text.encode())}


def _value(token: TokenLogprob) -> float:
    return max(token.logprob, MIN_LOGPROB)
