"""Text and token ids: encoding off the loop, chat templates, incremental decoding, stop strings."""

import asyncio
import codecs
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from tokenizers import Tokenizer

from services.common.errors import ResourceExhausted
from services.router.chat_template import ChatTemplate, Message

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
_SAMPLING_DEFAULTS: dict[str, type[int] | type[float]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
}


class IncrementalDecoder(Protocol):
    """Turns token ids into text one at a time; the texts joined equal the ids decoded all at once."""

    def step(self, token_id: int) -> str:
        """Return the text that this token completes."""

    def flush(self) -> str:
        """Return what is left at the end, incomplete characters replaced."""


class ByteLevelDecoder:
    """For byte-level tokenizers, whose tokens are bytes: a table and an incremental UTF-8 decoder."""

    __slots__ = ("_decode", "_table")

    def __init__(self, table: "ByteTable") -> None:
        self._table = table
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def step(self, token_id: int) -> str:
        """Return the text that this token completes."""
        return self._decode(self._table[token_id])

    def flush(self) -> str:
        """Return replacements for an incomplete character."""
        return self._decode(b"", True)


class ByteTable(dict[int, bytes]):
    """Bytes of each token of a byte-level tokenizer, filled as tokens occur; special and unknown tokens are empty."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self._bytes = _byte_of_symbol()

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        if token is None:
            value = b""
        else:
            symbols = [self._bytes.get(symbol) for symbol in token]
            value = token.encode() if None in symbols else bytes(cast("list[int]", symbols))
        self[token_id] = value
        return value


class WindowDecoder:
    """For any tokenizer: decodes a short window of recent tokens twice and returns what the new token added.

    Text that ends in a replacement character is held, as the next token may complete the character; the window starts
    at a token whose text is out, so that rules for the start of a text apply to both decodings alike.
    """

    _MOST_HELD = 8
    """More tokens than any character needs: a longer malformed run is let out."""
    __slots__ = ("_ids", "_prefix", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._prefix = 0

    def step(self, token_id: int) -> str:
        """Return the text that this token completes."""
        self._ids.append(token_id)
        return self._advance(len(self._ids) - self._prefix > self._MOST_HELD)

    def flush(self) -> str:
        """Return what was held."""
        return self._advance(True) if len(self._ids) > self._prefix else ""

    def _advance(self, force: bool) -> str:
        decode = self._tokenizer.decode
        text = decode(self._ids, skip_special_tokens=True)
        if text.endswith(_REPLACEMENT) and not force:
            return ""
        shown = decode(self._ids[: self._prefix], skip_special_tokens=True) if self._prefix else ""
        if len(text) > len(shown):
            # The tokens just shown are the context of the next ones.
            self._ids = self._ids[self._prefix :]
            self._prefix = len(self._ids)
            return text[len(shown) :]
        return ""


class TextStream:
    """The text of one request for its whole life, whatever worker its tokens come from."""

    __slots__ = (
        "_decoder", "_held", "_include_stop", "_longest", "_min_tokens", "_stops", "_tokens", "finished", "stop_string",
    )  # fmt: skip

    def __init__(
        self,
        decoder: IncrementalDecoder,
        stops: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        """Start an empty text.

        Args:
            stops: strings that end it; the match that is complete first counts.
            min_tokens: a match that is complete within so many tokens is not one, as in vLLM.
            include_stop: return the stop string as part of the text.
        """
        self._decoder = decoder
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._held = ""
        self._tokens = 0
        self.stop_string = ""
        """The stop string that was found."""
        self.finished = False
        """A stop string was found; nothing more is accepted."""

    def push(self, token_ids: Sequence[int], silent_last: bool = False) -> tuple[str, int]:
        """Return the new text, and how many of the tokens belong to the completion (fewer after a stop string).

        Args:
            silent_last: the last token is a stop token whose text is not part of the completion.
        """
        step = self._decoder.step
        if not self._stops:
            if len(token_ids) == 1:
                return "" if silent_last else step(token_ids[0]), 1
            spoken = token_ids[:-1] if silent_last else token_ids
            return "".join(map(step, spoken)), len(token_ids)
        pieces = []
        for index, token_id in enumerate(token_ids):
            silent = silent_last and index == len(token_ids) - 1
            self._tokens += 1
            pieces.append(self._scan("" if silent else step(token_id)))
            if self.finished:
                return "".join(pieces), index + 1
        return "".join(pieces), len(token_ids)

    def finish(self) -> str:
        """Return what is left at the end of the tokens."""
        if self.finished:
            return ""
        text = self._scan(self._decoder.flush())
        if not self.finished:
            text, self._held = text + self._held, ""
            self.finished = True
        return text

    def _scan(self, new: str) -> str:
        """Return the text that can no longer be part of a stop string, and hold the rest back."""
        before, text = len(self._held), self._held + new
        if self._tokens > self._min_tokens:
            match = self._first_match(text, before)
            if match is not None:
                start, self.stop_string = match
                self._held = ""
                self.finished = True
                return text[: start + len(self.stop_string)] if self._include_stop else text[:start]
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _first_match(self, text: str, before: int) -> tuple[int, str] | None:
        """Return the match that ends first, the longest of those; it must end within the new text."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop, max(before - len(stop) + 1, 0))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else best[1:]

    def _possible_start(self, text: str) -> int:
        """Return the length of the longest end of the text that some stop string starts with, but is not all of."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stops):
                return length
        return 0


class TextCodec:
    """The served model's tokenizer and chat template."""

    def __init__(self, directory: Path, *, threads: int = 2, queue: int = 256) -> None:
        """Load tokenizer.json, tokenizer_config.json, config.json and generation_config.json where present.

        Args:
            threads: that encode.
            queue: encodings waiting for a thread before more are refused.

        Raises:
            FileNotFoundError: no tokenizer.json.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {directory}")
        self._tokenizer: Any = Tokenizer.from_file(str(path))
        settings = _read_json(directory / "tokenizer_config.json")
        template = directory / "chat_template.jinja"
        source = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
        self._template = ChatTemplate(source, _special_tokens(settings)) if source else None
        model = _read_json(directory / "config.json")
        generation = _read_json(directory / "generation_config.json")
        self.eos_token_ids = _eos_ids(self._tokenizer, settings, model, generation)
        """Ids that end a text."""
        self.sampling_defaults = {
            name: kind(generation[name])
            for name, kind in _SAMPLING_DEFAULTS.items()
            if isinstance(generation.get(name), (int, float))
        }
        """What generation_config.json recommends to requests that say nothing, as vLLM applies it."""
        self.max_model_len = int(model.get("max_position_embeddings") or 0)
        """Context length that the model's configuration states; 0: not stated."""
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._added = {i: token.content for i, token in self._tokenizer.get_added_tokens_decoder().items()}
        self._table = ByteTable(self._tokenizer) if _is_byte_level(self._tokenizer) else None
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self._queue = queue
        self._waiting = 0

    async def encode(self, text: str, *, special_tokens: bool = True) -> bytes:
        """Return the ids of a text as u32 little-endian.

        Raises:
            ResourceExhausted: too many texts wait to be encoded.
        """
        return await self._run(self._encode, text, special_tokens)

    async def encode_chat(self, messages: Sequence[Message], *, continue_final: bool = False) -> bytes:
        """Return the ids of a conversation rendered by the chat template, as u32 little-endian.

        Raises:
            InvalidArgument: the model has no template, or the template refuses the messages.
            ResourceExhausted: too many texts wait to be encoded.
        """
        return await self._run(self._encode_chat, messages, continue_final)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of the ids, without special tokens."""
        return cast("str", self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def token_bytes(self, token_id: int) -> bytes:
        """Return what one token stands for by itself, a special one by its name; empty for an unknown id."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._added:
            return self._added.get(token_id, "").encode()
        if self._table is not None:
            return self._table[token_id]
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        text = cast("str", self._tokenizer.decode([token_id], skip_special_tokens=False))
        # Decoders drop the space at the start of a text, which this is not.
        return f" {text}".encode() if token.startswith(_SPACE) and not text.startswith(" ") else text.encode()

    def decoder(self) -> IncrementalDecoder:
        """Return a decoder for one request."""
        return ByteLevelDecoder(self._table) if self._table is not None else WindowDecoder(self._tokenizer)

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, function: Any, *arguments: Any) -> bytes:
        if self._waiting >= self._queue:
            raise ResourceExhausted(
                f"{self._queue} texts wait to be tokenized", reason="ENCODE_QUEUE", retry_safe=True, retry_after_ms=200
            )
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return cast("bytes", await loop.run_in_executor(self._threads, function, *arguments))
        finally:
            self._waiting -= 1

    def _encode(self, text: str, special_tokens: bool) -> bytes:
        ids = self._tokenizer.encode(text, add_special_tokens=special_tokens).ids
        return np.asarray(ids, dtype="<u4").tobytes()

    def _encode_chat(self, messages: Sequence[Message], continue_final: bool) -> bytes:
        if self._template is None:
            raise ChatTemplate.missing()
        # The template writes the special tokens itself.
        return self._encode(self._template.render(messages, continue_final=continue_final), False)


def _read_json(path: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _eos_ids(tokenizer: Any, settings: dict[str, Any], *configs: dict[str, Any]) -> frozenset[int]:
    found: set[int] = set()
    for config in configs:
        value = config.get("eos_token_id")
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    token = _special_tokens(settings).get("eos_token")
    token_id = tokenizer.token_to_id(token) if token else None
    return frozenset(found if token_id is None else {*found, token_id})


def _is_byte_level(tokenizer: Any) -> bool:
    if tokenizer.decoder is None:
        return False
    return bool(json.loads(tokenizer.decoder.__getstate__()).get("type") == "ByteLevel")


def _byte_of_symbol() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for: itself where it is printable."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
