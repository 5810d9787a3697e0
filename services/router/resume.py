"""Cursors with which a broken stream continues through any router: what the request itself does not say."""

import hmac
import struct
from dataclasses import dataclass

import numpy as np

from ascendra.v1 import inference_pb2
from services.common.errors import InvalidArgument
from services.router.text import TextStream
from services.router.validation import Limits, check_ids

_FORMAT = struct.Struct("<BQI")
_VERSION = 2
_TAG_BYTES = 16


@dataclass(frozen=True, slots=True)
class Cursor:
    """Choices that the first router made for a request."""

    seed: int
    max_tokens: int


def write_cursor(cursor: Cursor, prompt: bytes, tenant: str, key: bytes) -> bytes:
    """Return the opaque form, good for this prompt (ids, u32 little-endian) and tenant only.

    With a key that only routers know, nobody else can make one. Without, somebody who does gains nothing: everything in
    it is checked as if the request had asked for it.
    """
    content = _FORMAT.pack(_VERSION, cursor.seed, cursor.max_tokens)
    return content + _tag(content, prompt, tenant, key)


def read_cursor(data: bytes, prompt: bytes, tenant: str, key: bytes) -> Cursor:
    """Read a cursor of the same prompt and tenant. Raises InvalidArgument."""
    if len(data) != _FORMAT.size + _TAG_BYTES or data[0] != _VERSION:
        raise InvalidArgument("resume.cursor is not a cursor of this service", reason="BAD_CURSOR")
    content = data[: _FORMAT.size]
    if not hmac.compare_digest(data[_FORMAT.size :], _tag(content, prompt, tenant, key)):
        raise InvalidArgument("resume.cursor belongs to another prompt or tenant", reason="BAD_CURSOR")
    _, seed, max_tokens = _FORMAT.unpack(content)
    return Cursor(seed, max_tokens)


def _tag(content: bytes, prompt: bytes, tenant: str, key: bytes) -> bytes:
    name = tenant.encode()
    message = content + len(name).to_bytes(2, "little") + name + prompt
    return hmac.digest(key, message, "sha256")[:_TAG_BYTES]


def received_tokens(resume: inference_pb2.Resume, limits: Limits) -> list[int]:
    """Return the tokens that the client received. Raises InvalidArgument."""
    if len(resume.token_ids) % 4:
        raise InvalidArgument(f"resume.token_ids must be u32 little-endian, got {len(resume.token_ids)} bytes")
    check_ids("resume.token_ids", resume.token_ids, limits)
    return [int(token_id) for token_id in np.frombuffer(resume.token_ids, dtype="<u4").tolist()]


def replay_text(text: TextStream, token_ids: list[int], text_bytes: int) -> str:
    """Bring a text to where the client's stream broke and return what it has not received of it.

    Raises:
        InvalidArgument: the client claims more text than the tokens make, or half a character.
    """
    shown, taken = text.push(token_ids)
    if taken < len(token_ids):
        raise InvalidArgument("resume.token_ids go on after a stop string")
    if text.finished:
        shown += text.finish()
    encoded = shown.encode()
    if text_bytes > len(encoded):
        raise InvalidArgument(f"resume.text_bytes is {text_bytes}, but the tokens make {len(encoded)} bytes")
    try:
        return encoded[text_bytes:].decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument("resume.text_bytes ends within a character") from error
