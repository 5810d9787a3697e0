"""Reading a body of bounded size."""

import re
from collections.abc import Mapping

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from services.gateway.problems import BodyTooLarge

_LENGTH = re.compile("[0-9]{1,18}")


async def read_body(receive: Receive, headers: Mapping[str, str], limit_bytes: int) -> bytes:
    """Return the body. Raises BodyTooLarge as soon as that is known, ClientDisconnect when the client leaves."""
    declared = headers.get("content-length", "")
    if _LENGTH.fullmatch(declared) and int(declared) > limit_bytes:
        raise BodyTooLarge(limit_bytes)
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
