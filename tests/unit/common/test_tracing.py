"""Spans: off costs no import, on they reach a real collector under names that the conventions know."""

import subprocess
import sys

import pytest
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

from ascendra.v1 import worker_pb2
from services.common import span_names
from services.common.tracing import Tracer, make_tracer
from services.worker.tracing import AttemptTrace
from tests.support.otlp import collector

FACTS = {"worker": "w", "role": "low", "model_name": "tiny", "engine_kind": "emulated", "vllm_version": "0"}


@pytest.mark.parametrize("module", ["services.router.app", "services.gateway.app", "services.worker.servicer"])
def test_nothing_of_opentelemetry_is_imported_while_off(module: str) -> None:
    """Services start without the packages; a tracer without an endpoint is none."""
    code = f"import sys, {module}; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=100, check=False).returncode == 0
    assert make_tracer("router", "r", "", 1.0) is None


def test_names_are_those_of_the_conventions() -> None:
    """Each gen_ai name exists in the installed conventions, and is not one of the withdrawn ones."""
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    ours = {value for value in vars(span_names).values() if isinstance(value, str) and value.startswith("gen_ai.")}
    assert len(ours) > 10
    assert ours <= known
    withdrawn = {"gen_ai.system", "gen_ai.usage.prompt_tokens", "gen_ai.usage.completion_tokens", "gen_ai.prompt"}
    assert not ours & withdrawn


async def test_an_attempt_in_the_worker_is_a_child_of_the_routers() -> None:
    """By the context in Submit, with its events in order, its tokens counted, and no prompt."""
    async with collector("127.0.0.1:0") as (spans, endpoint):
        tracer = Tracer("worker", "w", endpoint, 1.0)
        parent = tracer.start("attempt w", "client", {})
        submit = worker_pb2.Submit(
            request_id="r", attempt=2, token_ids=b"\xaa\xbb\xcc\x01" * 3, traceparent=parent.traceparent
        )
        finished, aborted = (AttemptTrace(tracer, submit, FACTS) for _ in range(2))
        finished.event(span_names.PREFILL_STARTED)
        finished.tokens(1)
        finished.tokens(2)
        finished.finished("stop", 16)
        for trace in (finished, aborted):
            trace.ends()
        parent.end()
        await tracer.close()
    (above,) = spans.named("attempt w")
    done, lost = sorted(spans.named("engine tiny"), key=lambda span: span.attributes["ascendra.outcome"], reverse=True)
    assert done.is_child_of(above)
    assert lost.is_child_of(above)
    assert done.events == ["prefill_started", "first_token"]
    assert done.attributes["gen_ai.usage.output_tokens"] == 3
    assert done.attributes["gen_ai.usage.input_tokens"] == 3
    assert done.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert (done.attributes["ascendra.outcome"], lost.attributes["ascendra.outcome"]) == ("finished", "aborted")
    assert b"\xaa\xbb\xcc" not in done.raw.SerializeToString()


async def test_malformed_parents_begin_traces() -> None:
    """Whatever a client says, a span is made; only a valid context becomes its parent."""
    async with collector("127.0.0.1:0") as (spans, endpoint):
        tracer = Tracer("router", "r", endpoint, 1.0)
        for traceparent in ("", "nonsense", "00-0-0-01", "ff-" + "a" * 32 + "-" + "b" * 16 + "-01", "é" * 999):
            tracer.start("s", "server", {}, traceparent=traceparent, tracestate="x=" + "y" * 9999).end()
        await tracer.close()
    assert len(spans.spans) == 5
    assert len({span.raw.trace_id for span in spans.spans}) == 5
    assert not any(span.raw.parent_span_id for span in spans.spans)
