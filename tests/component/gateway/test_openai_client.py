"""The OpenAI SDK as the client."""

from typing import Any

import openai
import pytest

from ascendra.v1 import common_pb2, inference_pb2
from services.common import errors
from tests.component.gateway.conftest import Serve
from tests.support import scripted_router as scripted
from tests.support.scripted_router import Fail, Script, Step, accepted, counting, tokens

USER: Any = {"role": "user", "content": "hello"}


def with_logprobs(*ids: int) -> Script:
    """Return a script whose tokens are characters with log-probabilities."""

    def script(request: inference_pb2.GenerateRequest) -> list[Step]:
        steps: list[Step] = [accepted(request)]
        for offset, token_id in enumerate(ids):
            top = [
                common_pb2.TokenLogprob(token_id=other, logprob=-0.5 * (rank + 1), rank=rank + 1)
                for rank, other in enumerate((token_id, token_id + 1)[: request.sampling.logprobs])
            ]
            message = tokens(offset, token_id, text=chr(token_id))
            message.logprobs.add(sampled=common_pb2.TokenLogprob(token_id=token_id, logprob=-0.5, rank=1), top=top)
            steps.append(message)
        return [*steps, scripted.finished(len(ids))]

    return script


async def test_completion(serve: Serve) -> None:
    """A whole completion has text, usage, finish reason and receipt."""
    async with scripted.serve(counting(5)) as router, serve(router) as served:
        answer = await served.openai.completions.create(model="tiny", prompt="hello", max_tokens=5, seed=9)
    assert answer.choices[0].text == " 0 1 2 3 4"
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == "tiny"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 5, 8)
    assert answer.model_extra is not None
    assert answer.model_extra["ascendra"]["target"] == {"ttft_ms": 500, "tbt_ms": 50}
    assert answer.model_extra["ascendra"]["met"] is False
    assert answer.model_extra["ascendra"]["pool"] == "high"
    request = router.requests[0]
    assert (request.text, request.model, request.sampling.max_tokens, request.sampling.seed) == ("hello", "tiny", 5, 9)


async def test_the_receipt_is_in_the_headers_of_a_whole_answer(serve: Serve) -> None:
    """What was achieved can be read without parsing the body."""
    async with scripted.serve(counting(2)) as router, serve(router) as served:
        raw = await served.openai.completions.with_raw_response.create(
            model="tiny", prompt="x", extra_headers={"x-request-id": "my-id.1"}
        )
    assert raw.headers["x-ascendra-slo-met"] == "false"
    assert raw.headers["x-ascendra-ttft-ms"] == "12.500"
    assert raw.headers["x-ascendra-pool"] == "high"
    assert raw.headers["x-request-id"] == "my-id.1"
    assert router.requests[0].request_id == "my-id.1"


async def test_completion_stream(serve: Serve) -> None:
    """A stream has one chunk a token, the end, and the usage asked for."""
    async with scripted.serve(counting(5, pause_s=0.01)) as router, serve(router) as served:
        stream = await served.openai.completions.create(
            model="tiny", prompt="hello", stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == " 0 1 2 3 4"
    assert [chunk.choices[0].text for chunk in chunks[:2]] == [" 0", " 1"]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 5 + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5
    final = chunks[-2].model_extra
    assert final is not None
    assert final["ascendra"]["seed"] == 7


async def test_chat(serve: Serve) -> None:
    """A whole chat answer is one assistant message."""
    async with scripted.serve(counting(3)) as router, serve(router) as served:
        parts: Any = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
        answer = await served.openai.chat.completions.create(model="tiny", messages=[parts], max_completion_tokens=3)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", " 0 1 2")
    assert answer.object == "chat.completion"
    sent = router.requests[0]
    assert [(m.role, m.content) for m in sent.chat.messages] == [("user", "a\nb")]
    assert sent.sampling.max_tokens == 3


async def test_chat_stream_gives_the_role_with_the_first_output(serve: Serve) -> None:
    """No chunk comes before the first token, so that clients measure its true time."""
    async with scripted.serve(counting(3, pause_s=0.01)) as router, serve(router) as served:
        stream = await served.openai.chat.completions.create(model="tiny", messages=[USER], stream=True)
        chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", " 0")
    assert [delta.role for delta in deltas[1:]] == [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == " 0 1 2"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len(chunks) == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_n_choices_of_several_prompts(serve: Serve, stream: bool) -> None:
    """Choices are numbered over prompts and samples; seeds differ by sample; the prompt counts once in the usage."""
    async with scripted.serve(counting(3, pause_s=0.002)) as router, serve(router) as served:
        options: dict[str, Any] = {"model": "tiny", "prompt": ["a", "b"], "n": 2, "seed": 5}
        if stream:
            texts = ["", "", "", ""]
            usage = None
            events = await served.openai.completions.create(
                **options, stream=True, stream_options={"include_usage": True}
            )
            async for event in events:
                usage = event.usage
                for choice in event.choices:
                    texts[choice.index] += choice.text
        else:
            answer = await served.openai.completions.create(**options)
            assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
            texts = [choice.text for choice in answer.choices]
            usage = answer.usage
    assert texts == [" 0 1 2"] * 4
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (6, 12)
    sent = sorted((request.request_id[-1], request.text, request.sampling.seed) for request in router.requests)
    assert sent == [("0", "a", 5), ("1", "a", 6), ("2", "b", 5), ("3", "b", 6)]


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(serve: Serve, stream: bool) -> None:
    """Chat log-probabilities name each token and its likeliest rivals by their text."""
    options: dict[str, Any] = {"model": "tiny", "messages": [USER], "logprobs": True, "top_logprobs": 2}
    async with scripted.serve(with_logprobs(ord("h"), ord("i"))) as router, serve(router) as served:
        if stream:
            events: Any = await served.openai.chat.completions.create(**options, stream=True)
            content = [
                item
                async for event in events
                if event.choices[0].logprobs
                for item in event.choices[0].logprobs.content or []
            ]
        else:
            answer = await served.openai.chat.completions.create(**options)
            assert answer.choices[0].logprobs is not None
            content = answer.choices[0].logprobs.content or []
    assert router.requests[0].sampling.logprobs == 2
    assert [item.token for item in content] == ["h", "i"]
    assert content[0].logprob == pytest.approx(-0.5)
    assert content[0].bytes == [ord("h")]
    assert [(top.token, top.logprob) for top in content[1].top_logprobs] == [("i", -0.5), ("j", -1.0)]


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs(serve: Serve, stream: bool) -> None:
    """Completion log-probabilities come in columns, with offsets into the text."""
    options: dict[str, Any] = {"model": "tiny", "prompt": "x", "logprobs": 2}
    async with scripted.serve(with_logprobs(ord("h"), ord("i"))) as router, serve(router) as served:
        if stream:
            events = await served.openai.completions.create(**options, stream=True)
            parts = [event.choices[0].logprobs async for event in events if event.choices[0].logprobs]
        else:
            answer = await served.openai.completions.create(**options)
            assert answer.choices[0].logprobs is not None
            parts = [answer.choices[0].logprobs]
    assert [token for part in parts for token in part.tokens or []] == ["h", "i"]
    assert [offset for part in parts for offset in part.text_offset or []] == [0, 1]
    assert [top for part in parts for top in part.top_logprobs or []] == [
        {"h": -0.5, "i": -1.0},
        {"i": -0.5, "j": -1.0},
    ]
    assert [value for part in parts for value in part.token_logprobs or []] == [-0.5, -0.5]


async def test_tokens_can_be_named_by_id(serve: Serve) -> None:
    """`return_tokens_as_token_ids` and `return_token_ids` give ids instead of and beside text."""
    async with scripted.serve(with_logprobs(104, 105)) as router, serve(router) as served:
        answer = await served.openai.completions.create(
            model="tiny",
            prompt="x",
            logprobs=1,
            extra_body={"return_tokens_as_token_ids": True, "return_token_ids": True},
        )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["token_id:104", "token_id:105"]
    assert choice.model_extra is not None
    assert choice.model_extra["token_ids"] == [104, 105]


async def test_extensions_reach_the_router(serve: Serve) -> None:
    """vLLM's and Ascendra's extensions of the body arrive as typed fields."""
    extra = {
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "ignore_eos": True,
        "min_tokens": 2,
        "stop_token_ids": [7],
        "include_stop_str_in_output": True,
        "slo": {"ttft_ms": 300, "tbt_ms": 40},
        "slo_class": "interactive",
        "priority": -2,
        "on_overload": "refuse",
        "a_field_that_nobody_knows": {"x": 1},
    }
    headers = {"x-session-id": "s1", "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    async with scripted.serve(counting(2)) as router, serve(router) as served:
        await served.openai.completions.create(
            model="tiny",
            prompt=[1, 2, 300],
            stop=["END", "STOP"],
            logit_bias={"5": -100},
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            extra_body=extra,
            extra_headers=headers,
        )
    request = router.requests[0]
    sampling = request.sampling
    assert request.tokens.token_ids == b"".join(i.to_bytes(4, "little") for i in (1, 2, 300))
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (4, 0.1, 1.2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.ignore_eos, sampling.min_tokens, list(sampling.stop_token_ids)) == (True, 2, [7])
    assert (list(sampling.stop), sampling.include_stop_in_output) == ([b"END", b"STOP"], True)
    assert dict(sampling.logit_bias) == {5: -100}
    assert (request.slo.ttft_ms, request.slo.tbt_ms, request.slo_class) == (300, 40, "interactive")
    assert (request.priority, request.on_overload) == (-2, inference_pb2.OVERLOAD_ACTION_REFUSE)
    assert (request.session_id, request.traceparent) == ("s1", headers["traceparent"])


async def test_structured_output(serve: Serve) -> None:
    """`response_format` becomes a constraint."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    response_format: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    async with scripted.serve(counting(1)) as router, serve(router) as served:
        await served.openai.chat.completions.create(
            model="tiny",
            messages=[USER],
            response_format=response_format,
        )
        await served.openai.completions.create(model="tiny", prompt="x", extra_body={"guided_choice": ["yes", 'n"o']})
    assert router.requests[0].sampling.structured_output.json_schema == (
        '{"type":"object","properties":{"a":{"type":"integer"}}}'
    )
    assert router.requests[1].sampling.structured_output.grammar == 'root ::= "yes" | "n\\"o"'


async def test_echo_puts_the_prompt_first(serve: Serve) -> None:
    """`echo` works for text and for token ids."""
    async with scripted.serve(counting(2)) as router, serve(router) as served:
        text = await served.openai.completions.create(model="tiny", prompt="hey", echo=True)
        ids = await served.openai.completions.create(model="tiny", prompt=[104, 105], echo=True)
        stream = await served.openai.completions.create(model="tiny", prompt="hey", echo=True, stream=True)
        streamed = [chunk.choices[0].text async for chunk in stream]
    assert text.choices[0].text == "hey 0 1"
    assert ids.choices[0].text == "hi 0 1"
    assert "".join(streamed) == "hey 0 1"


async def test_models(serve: Serve) -> None:
    """The models of the routers are listed and found by name."""
    async with scripted.serve(counting(1)) as router, serve(router) as served:
        assert [model.id async for model in served.openai.models.list()] == ["tiny"]
        assert (await served.openai.models.retrieve("tiny")).id == "tiny"
        with pytest.raises(openai.NotFoundError):
            await served.openai.models.retrieve("other")


async def test_the_sdk_sees_an_error_in_the_middle_of_a_stream(serve: Serve) -> None:
    """After the first token a failure is an event, which the SDK raises."""

    def script(request: inference_pb2.GenerateRequest) -> list[Step]:
        return [accepted(request, cursor=b""), tokens(0, 1), Fail(errors.Unavailable("the worker died"))]

    async with scripted.serve(script) as router, serve(router) as served:
        stream = await served.openai.completions.create(model="tiny", prompt="x", stream=True)
        received = []
        with pytest.raises(openai.APIError, match="the worker died"):
            async for chunk in stream:
                received.append(chunk.choices[0].text)
    assert received == [" 1"]
