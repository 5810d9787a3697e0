"""The gateway's span: a child of the client's, the parent of those of its completions."""

from services.common import span_names
from tests.component.gateway.conftest import Serve
from tests.support import scripted_router as scripted
from tests.support.otlp import collector
from tests.support.scripted_router import counting

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "zq7secret"


async def test_an_exchange_is_a_span(serve: Serve) -> None:
    """All choices hear its context; a client that does not sample is heeded; errors of the client are no failures."""
    async with (
        collector("127.0.0.1:0") as (spans, endpoint),
        scripted.serve(counting(4)) as router,
        serve(router, otlp_endpoint=endpoint) as served,
    ):
        body = {"model": "tiny", "prompt": SECRET, "n": 2}
        for flags in ("01", "00"):
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}", "x-request-id": f"r{flags}"}
            assert (await served.http.post("/v1/completions", json=body, headers=headers)).status_code == 200
        assert (await served.http.post("/v1/chat/completions", json={"messages": 1})).status_code == 400
        await served.gateway.close()
    good, bad = spans.named("POST /v1/completions"), spans.named("POST /v1/chat/completions")
    assert len(good) == len(bad) == 1
    assert (good[0].raw.trace_id.hex(), good[0].raw.parent_span_id.hex()) == (TRACE, PARENT)
    passed = {request.request_id: request.traceparent.split("-") for request in router.requests}
    assert {tuple(parts[1:3]) for name, parts in passed.items() if name.startswith("r01")} == {
        (TRACE, good[0].raw.span_id.hex())
    }
    assert [int(parts[3], 16) & 1 for _, parts in sorted(passed.items())] == [0, 0, 1, 1]
    assert good[0].attributes[span_names.HTTP_STATUS] == 200
    assert good[0].attributes[span_names.OUTPUT_TOKENS] == 8
    assert good[0].attributes[span_names.REQUEST_CHOICES] == 2
    assert good[0].events == ["first_token"]
    assert bad[0].attributes[span_names.HTTP_STATUS] == 400
    assert not bad[0].failed
    assert not bad[0].raw.parent_span_id
    assert SECRET.encode() not in b"".join(span.raw.SerializeToString() for span in spans.spans)
