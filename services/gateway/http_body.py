"""Reading a body of bounded size in bounded time."""

import asyncio
import re
from collections.abc import Mapping

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from services.gateway.problems import ApiError, BodyTooLarge

_LENGTH = re.compile("[0-9]{1,18}")


async def read_body(receive: Receive, headers: Mapping[str, str], limit_bytes: int, limit_s: float) -> bytes:
    """Return the body.

    Raises:
        BodyTooLarge: as soon as that is known.
        ApiError: the client takes too long (408).
        ClientDisconnect: it leaves.
    """
    declared = headers.get("content-length", "")
    if _LENGTH.fullmatch(declared) and int(declared) > limit_bytes:
        raise BodyTooLarge(limit_bytes)
    try:
        async with asyncio.timeout(limit_s):
            return await _read(receive, limit_bytes)
    except TimeoutError:
        message = f"the body did not arrive within {limit_s:g} s"
        raise ApiError(408, message, code="request_timeout", headers={"connection": "close"}) from None


async def _read(receive: Receive, limit_bytes: int) -> bytes:
    parts: list[bytes] = []
    size_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part = message.get("body", b"")
        size_bytes += len(part)
        if size_bytes > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)
