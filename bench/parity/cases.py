"""The requests that both servers get, and where and why their answers are meant to differ."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
PROMPT = "Return a list of"
OTHER_PROMPT = "The module provides a class that"
LONG_PROMPT = "The following function returns the number of items in a list. " * 24
SYSTEM = {"role": "system", "content": "Answer in one sentence."}
USER = {"role": "user", "content": "What is a list?"}
TURNS = [SYSTEM, USER, {"role": "assistant", "content": "A sequence."}, {"role": "user", "content": "And a tuple?"}]
USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}

NOISE = "seeded noise is keyed by position, so that a stream that moves between workers keeps its text"
PROMPT_LOGPROBS = "log-probabilities of the prompt are not computed: refused rather than left out"
ROOM = "max_tokens beyond the context is cut to what fits; vllm refuses it"
GREEDY_SAMPLES = "n greedy choices are served, all alike, as by OpenAI; vllm refuses n above 1 at temperature 0"
DEFAULT_LENGTH = "a chat without max_tokens gets the router's default-max-tokens; vllm gives the rest of the context"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request."""

    name: str
    path: str
    body: dict[str, Any] = field(default_factory=dict)
    differs: str = ""
    """Why the answers differ; empty: they must be the same."""


def cases(model: str) -> list[Case]:
    """Return all requests, for a served model of this name."""
    made = [*_completions(), *_chats(), *_errors()]
    for case in made:
        case.body.setdefault("model", model)
    return made


def _text(name: str, *, differs: str = "", **body: Any) -> Case:
    given = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "return_token_ids": True} | body
    return Case(name=f"completion, {name}", path=TEXT, body=given, differs=differs)


def _chat(name: str, *, differs: str = "", **body: Any) -> Case:
    given = {"messages": [SYSTEM, USER], "max_tokens": 24, "temperature": 0, "return_token_ids": True} | body
    return Case(name=f"chat, {name}", path=CHAT, body=given, differs=differs)


def _completions() -> Iterator[Case]:
    yield _text("plain")
    yield _text("stream", stream=True)
    yield _text("stream with usage", stream=True, **USAGE)
    continuous = {"include_usage": True, "continuous_usage_stats": True}
    yield _text("stream with usage in every event", stream=True, stream_options=continuous, max_tokens=6)
    yield _text("default max_tokens", max_tokens=None)
    yield _text("one token", max_tokens=1)
    yield _text("long", max_tokens=300, ignore_eos=True)
    yield _text("long prompt", prompt=LONG_PROMPT, max_tokens=40)
    yield _text("long prompt, stream", prompt=LONG_PROMPT, max_tokens=40, stream=True, **USAGE)
    yield _text("prompt of token ids", prompt=[100, 200, 300, 400, 500])
    yield _text("several prompts", prompt=[PROMPT, OTHER_PROMPT, "Raise"])
    yield _text("several prompts, stream", prompt=[PROMPT, OTHER_PROMPT, "Raise"], stream=True, **USAGE)
    yield _text("several prompts of token ids", prompt=[[100, 200, 300], [400, 500]])
    yield _text("echo", echo=True, return_token_ids=False)
    yield _text("echo, stream", echo=True, stream=True, return_token_ids=False, **USAGE)
    yield _text("echo of token ids", echo=True, prompt=[100, 200, 300, 400, 500], return_token_ids=False)
    yield _text("echo with token ids", echo=True)
    yield _text("echo without generation", echo=True, max_tokens=0, return_token_ids=False)
    yield _text("stop string", stop="ent val", max_tokens=60)
    yield _text("stop string, stream", stop="ent val", max_tokens=60, stream=True, **USAGE)
    yield _text("several stop strings", stop=["zzz", "ue.", "\n\n"], max_tokens=60)
    yield _text("stop string kept", stop="ent val", include_stop_str_in_output=True, max_tokens=60)
    yield _text("stop string after min_tokens", stop=[" ", "a", "e"], min_tokens=12, max_tokens=60)
    yield _text("stop token", stop_token_ids=[451, 4000], max_tokens=60)
    yield _text("stop token kept", stop_token_ids=[451, 4000], include_stop_str_in_output=True)
    yield _text("ignore_eos", ignore_eos=True, max_tokens=60)
    yield _text("min_tokens", min_tokens=50, max_tokens=60, ignore_eos=True)
    yield _text("eos by bias", logit_bias={"2": 100})
    yield _text("eos by bias after min_tokens", logit_bias={"2": 100}, min_tokens=5)
    yield _text("eos by bias, ignored", logit_bias={"2": 100}, ignore_eos=True, max_tokens=5, logprobs=1)
    yield _text("logprobs", logprobs=0)
    yield _text("five logprobs", logprobs=5)
    yield _text("logprobs, stream", logprobs=3, stream=True, **USAGE)
    yield _text("logprobs of half characters", logprobs=2, allowed_token_ids=list(range(150, 260)), max_tokens=16)
    yield _text("logprobs by token id", logprobs=2, return_tokens_as_token_ids=True)
    yield _text("logprobs with stop string", logprobs=2, stop="ent val", max_tokens=60)
    yield _text("penalties", presence_penalty=1.5, frequency_penalty=0.7, max_tokens=60, ignore_eos=True)
    yield _text("repetition penalty", repetition_penalty=1.3, max_tokens=60, ignore_eos=True)
    yield _text("logit_bias", logit_bias={"300": 5, "301": -100, "310": 2.5})
    yield _text("allowed tokens", allowed_token_ids=[300, 301, 302, 400], ignore_eos=True)
    yield _text("bad words", bad_words=[" the", " a"], max_tokens=40)
    yield _text("top_k of one", temperature=1, top_k=1, seed=7)
    yield _text("no special tokens added", add_special_tokens=False)
    yield _text("regex", structured_outputs={"regex": "[a-c]{3,9}"}, max_tokens=30)
    yield _text("samples", n=2, temperature=0.8, seed=11, differs=NOISE)
    yield _text("echo with logprobs", echo=True, logprobs=1, return_token_ids=False, differs=PROMPT_LOGPROBS)


def _chats() -> Iterator[Case]:
    yield _chat("plain")
    yield _chat("stream with usage", stream=True, **USAGE)
    yield _chat("several turns", messages=TURNS, max_completion_tokens=30)
    yield _chat("content parts", messages=[{"role": "user", "content": [{"type": "text", "text": "a list"}]}])
    yield _chat("stop string, stream", stop=["nt value of", "zzz"], max_tokens=60, stream=True, **USAGE)
    yield _chat("logprobs", logprobs=True)
    yield _chat("top_logprobs, stream", logprobs=True, top_logprobs=3, stream=True, **USAGE)
    yield _chat("penalties", presence_penalty=1, frequency_penalty=1, repetition_penalty=1.1, ignore_eos=True)
    yield _chat("json_schema", response_format=_schema(), max_tokens=40)
    yield _chat(
        "last message continued",
        messages=[USER, {"role": "assistant", "content": "A list is"}],
        continue_final_message=True,
        add_generation_prompt=False,
    )
    yield _chat("two choices of one token", n=2, temperature=1, top_k=1, seed=3)
    yield _chat("without max_tokens", max_tokens=None, ignore_eos=True, stream=True, differs=DEFAULT_LENGTH, **USAGE)


def _errors() -> Iterator[Case]:
    yield Case(name="error, unknown model", path=TEXT, body={"model": "nobody", "prompt": PROMPT})
    yield Case(name="error, no prompt", path=TEXT)
    yield Case(name="error, no messages", path=CHAT)
    yield _text("error, wrong type", max_tokens="many")
    yield _text("error, top_p above 1", top_p=2)
    yield _text("error, negative max_tokens", max_tokens=-1)
    yield _text("error, prompt beyond the context", prompt=[300] * 1500)
    yield _text("error, stream options without stream", stream_options={"include_usage": True})
    yield _text("error, token id beyond the vocabulary", prompt=[4_000_000])
    yield _text("error, too many logprobs", logprobs=21)
    yield _text("error, min_tokens above max_tokens", min_tokens=50)
    yield _chat("error, top_logprobs without logprobs", top_logprobs=2)
    yield _text("greedy samples", n=2, differs=GREEDY_SAMPLES)
    yield _text("max_tokens beyond the context", max_tokens=5000, ignore_eos=True, differs=ROOM)
    yield _text("error, temperature above 2", temperature=2.5, top_k=1)


def _schema() -> dict[str, Any]:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
