"""Server-sent events as clients measure them."""

import asyncio
import json
import socket
from typing import Any

from tests.component.gateway.conftest import Serve
from tests.support import scripted_router as scripted
from tests.support.cluster import until
from tests.support.scripted_router import Pause, Step, counting, tokens


def loads(events: list[str]) -> list[dict[str, Any]]:
    """Return the events before [DONE]."""
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


async def test_a_token_without_text_has_its_own_event(serve: Serve) -> None:
    """Half a character is a token all the same: clients count events."""
    steps: list[Step] = [tokens(0, 1, text=""), Pause(0.01), tokens(1, 2, text="é"), Pause(0.01), scripted.finished(2)]
    async with scripted.serve(scripted.always(*steps)) as router, serve(router) as served:
        events = loads(await served.events("/v1/completions", {"prompt": "x"}))
    assert [event["choices"][0]["text"] for event in events] == ["", "é", ""]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, "length"]


async def test_continuous_usage_counts_up(serve: Serve) -> None:
    """Every event carries the counts so far."""
    body = {"prompt": "x", "stream_options": {"continuous_usage_stats": True, "include_usage": True}}
    async with scripted.serve(counting(3, pause_s=0.01)) as router, serve(router) as served:
        events = loads(await served.events("/v1/completions", body))
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3, 3]
    assert {event["usage"]["prompt_tokens"] for event in events} == {3}
    assert [event["usage"]["total_tokens"] for event in events] == [4, 5, 6, 6, 6]


async def test_usage_is_sent_only_when_asked_for(serve: Serve) -> None:
    """Without stream_options no event has usage."""
    async with scripted.serve(counting(2)) as router, serve(router) as served:
        events = loads(await served.events("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}))
    assert not any("usage" in event for event in events)


async def test_nothing_is_sent_before_the_first_token(serve: Serve) -> None:
    """The status line waits for the first token, so that a failure before it has a status."""
    async with scripted.serve(scripted.always(Pause(60))) as router, serve(router) as served:
        reader, writer = await asyncio.open_connection(*served.address.rsplit(":", 1))
        body = b'{"prompt":"x","stream":true}'
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await router.until(lambda router: bool(router.requests))
        read = asyncio.create_task(reader.read(1))
        done, _ = await asyncio.wait({read}, timeout=0.3)
        assert not done
        read.cancel()
        writer.close()


async def test_tokens_are_sent_as_they_come(serve: Serve) -> None:
    """The first event arrives while the model still generates."""
    script = scripted.always(tokens(0, 1), Pause(60))
    async with scripted.serve(script) as router, serve(router) as served:
        body = {"prompt": "x", "stream": True}
        async with served.http.stream("POST", "/v1/completions", json=body) as answer:
            first = await anext(answer.aiter_lines())
    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == " 1"


async def test_a_reader_that_falls_behind_gets_every_token(serve: Serve) -> None:
    """Tokens that wait for a slow client share events; none is lost, and the gateway holds a bounded amount."""
    count = 400
    text = "x" * 40_000  # in all, more than the kernel's buffers hold
    script = scripted.always(*(tokens(i, i, text=text) for i in range(count)), scripted.finished(count))
    async with scripted.serve(script) as router, serve(router) as served:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        client.setblocking(False)
        host, _, port = served.address.rpartition(":")
        await asyncio.get_running_loop().sock_connect(client, (host, int(port)))
        reader, writer = await asyncio.open_connection(sock=client, limit=1 << 14)
        body = b'{"prompt":"x","stream":true,"return_token_ids":true}'
        writer.write(b"POST /v1/completions HTTP/1.0\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        # Meanwhile the client does not read.
        await until(lambda: served.server.blocked_connections == 1, "the gateway to be unable to write")
        await asyncio.sleep(0.3)
        received = bytearray()
        while part := await reader.read(1 << 20):
            received += part
        writer.close()
    lines = [line for line in bytes(received).split(b"\n") if b"data: {" in line]
    events = [json.loads(line[line.index(b"{") : line.rindex(b"}") + 1]) for line in lines]
    assert len(events) < count
    assert [i for event in events for i in event["choices"][0]["token_ids"]] == list(range(count))
    assert "".join(event["choices"][0]["text"] for event in events) == text * count


async def test_slo_headers(serve: Serve) -> None:
    """Both spellings of the objective headers are read; the body wins."""
    ask = {"prompt": "x"}
    async with scripted.serve(counting(1)) as router, serve(router) as served:
        post = served.http.post
        await post("/v1/completions", json=ask, headers={"x-slo-ttft-ms": "250", "x-slo-tpot-ms": "30"})
        await post("/v1/completions", json=ask, headers={"x-llm-d-slo-ttft-ms": "251", "x-llm-d-slo-tpot-ms": "31"})
        await post("/v1/completions", json={**ask, "slo": {"ttft_ms": 99}}, headers={"x-slo-ttft-ms": "250"})
        await post("/v1/completions", json=ask, headers={"x-tenant-id": "team-a"})
    asked = [(request.slo.ttft_ms, request.slo.tbt_ms) for request in router.requests[:3]]
    assert asked == [(250, 30), (251, 31), (99, 0)]
    assert not router.requests[3].HasField("slo")
    assert router.requests[3].tenant == "team-a"


async def test_default_limits_on_tokens(serve: Serve) -> None:
    """/v1/completions has OpenAI's default of 16 tokens; chat leaves it to the router."""
    async with scripted.serve(counting(1)) as router, serve(router) as served:
        await served.http.post("/v1/completions", json={"prompt": "x"})
        await served.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    assert router.requests[0].sampling.max_tokens == 16
    assert not router.requests[1].sampling.HasField("max_tokens")


async def test_special_tokens_can_be_left_out(serve: Serve) -> None:
    """`add_special_tokens: false` sends the ids of the bare text."""
    async with scripted.serve(counting(1)) as router, serve(router) as served:
        await served.http.post("/v1/completions", json={"prompt": "hi", "add_special_tokens": False})
    assert router.requests[0].tokens.token_ids == b"h\0\0\0i\0\0\0"
