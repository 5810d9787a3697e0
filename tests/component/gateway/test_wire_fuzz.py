"""Bytes that are no HTTP, or almost: the gateway answers or hangs up, keeps nothing, and serves the next client."""

import asyncio
import json
import random

from tests.component.gateway.conftest import Serve
from tests.support import scripted_router as scripted
from tests.support.local_router import until
from tests.support.scripted_router import counting

ATTEMPTS = 300
AT_ONCE = 25


def damaged(draw: random.Random) -> bytes:
    """Return a request with pieces cut out, repeated, replaced or put in at random."""
    body = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 3, "stream": draw.random() < 0.5}).encode()
    path = draw.choice([b"/v1/completions", b"/v1/models", b"/tokenize", b"/%00%ff", b"/console/explain/" + b"x" * 300])
    request = bytearray(
        draw.choice([b"POST ", b"GET ", b"PRI * "]) + path + b" HTTP/1.1\r\nhost: x\r\nx-slo-ttft-ms: 5\r\n"
        b"x-request-id: a\r\ncontent-length: " + str(len(body)).encode() + b"\r\n\r\n" + body
    )
    for _ in range(draw.randint(0, 6)):
        place = draw.randrange(len(request) + 1)
        match draw.randrange(4):
            case 0:
                del request[place : place + draw.randint(1, 20)]
            case 1:
                request[place:place] = draw.randbytes(draw.randint(1, 8))
            case 2:
                request[place:place] = request[place : place + draw.randint(1, 60)]
            case _:
                request[place:place] = draw.choice(
                    [b"\r\n", b"\n", b"\0", b"transfer-encoding: chunked\r\n", b"999999"]
                )
    return bytes(request)


async def test_damaged_requests(serve: Serve) -> None:
    """Every connection ends soon, no answer is a 500, nothing is left in progress, and /live still answers."""
    draw = random.Random(1)
    async with scripted.serve(counting(3)) as router, serve(router, keep_alive_s=1) as served:
        host, _, port = served.address.rpartition(":")

        async def one(request: bytes) -> bytes:
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(request)
                writer.write_eof()
                return await asyncio.wait_for(reader.read(), 30)
            except ConnectionResetError:
                return b""
            finally:
                writer.close()

        for _ in range(ATTEMPTS // AT_ONCE):
            answers = await asyncio.gather(*(one(damaged(draw)) for _ in range(AT_ONCE)))
            assert not [answer for answer in answers if b"HTTP/1.1 500" in answer]
        await until(lambda: not served.gateway.in_flight)
        assert (await served.http.get("/live")).status_code == 200
        assert (await served.http.post("/v1/completions", json={"prompt": "x"})).status_code == 200
