"""Text from tokens: exact for every tokenizer family, however the tokens are split; stop strings held back."""

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import InvalidArgument, ResourceExhausted
from services.router.text import TextCodec, TextStream, WindowDecoder
from tests.support.tokenizer_files import write_byte_fallback, write_byte_level, write_word_piece

SENTENCES = ["the cat sings.", "naïve café 中文 🙂🏽 a", "  two  spaces\n\ttab", "مرحبا 👩‍👩‍👧 end", "a"]


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextCodec]:
    """One codec per tokenizer family."""
    root = tmp_path_factory.mktemp("tokenizers")
    writers: dict[str, Callable[[Path], Path]] = {
        "byte_level": write_byte_level,
        "byte_fallback": write_byte_fallback,
        "word_piece": write_word_piece,
    }
    return {name: TextCodec(write(root / name)) for name, write in writers.items()}


def pieces(token_ids: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    """Split ids at the given places."""
    places = sorted({cut % (len(token_ids) + 1) for cut in cuts})
    return [token_ids[a:b] for a, b in zip([0, *places], [*places, len(token_ids)], strict=True)]


def run(stream: TextStream, parts: Sequence[Sequence[int]]) -> tuple[str, int]:
    """Push all parts; return the whole text and the number of tokens taken."""
    text, taken = "", 0
    for part in parts:
        if stream.finished:
            break
        new, count = stream.push(part)
        text += new
        taken += count
    return text + stream.finish(), taken


@settings(max_examples=200, deadline=None)
@given(token_ids=st.lists(st.integers(0, 515), max_size=40), cuts=st.lists(st.integers(0, 40), max_size=6))
def test_byte_level_text_is_exact_for_any_tokens(
    codecs: dict[str, TextCodec], token_ids: list[int], cuts: list[int]
) -> None:
    """Random tokens, malformed bytes and unknown ids included, in random messages give the text of all at once."""
    codec = codecs["byte_level"]
    assert run(TextStream(codec.decoder()), pieces(token_ids, cuts))[0] == codec.decode(token_ids)


@settings(max_examples=100, deadline=None)
@given(
    family=st.sampled_from(["byte_level", "byte_fallback", "word_piece"]),
    text=st.one_of(st.sampled_from(SENTENCES), st.text(max_size=30)),
    cuts=st.lists(st.integers(0, 60), max_size=6),
)
def test_text_of_any_family_is_exact(codecs: dict[str, TextCodec], family: str, text: str, cuts: list[int]) -> None:
    """Encoded text comes back as decoding all tokens at once gives it, whatever the family and the messages."""
    codec = codecs[family]
    token_ids = np.frombuffer(codec._encode(text, False), dtype="<u4").tolist()
    assert run(TextStream(codec.decoder()), pieces(token_ids, cuts))[0] == codec.decode(token_ids)
    window = TextStream(WindowDecoder(codec._tokenizer))
    assert run(window, pieces(token_ids, cuts))[0] == codec.decode(token_ids)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="abc ", max_size=40),
    stops=st.lists(st.text(alphabet="abc ", min_size=1, max_size=5), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    include=st.booleans(),
)
def test_stop_strings_cut_at_the_first_complete_match(
    codecs: dict[str, TextCodec], text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    """The text ends at the match that is complete first, the longest of those; splits do not matter."""
    codec = codecs["byte_level"]
    token_ids = [codec._tokenizer.token_to_id(symbol) for symbol in text.replace(" ", "Ġ")]
    stream = TextStream(codec.decoder(), stops, include_stop=include)
    shown, taken = run(stream, pieces(token_ids, cuts))
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not ends:
        assert (shown, stream.stop_string, taken) == (text, "", len(token_ids))
        return
    end, start, stop = min(ends)
    assert shown == text[: end if include else start]
    assert stream.stop_string == stop
    assert taken == end


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab", max_size=30),
    stop=st.text(alphabet="ab", min_size=1, max_size=6),
)
def test_no_part_of_a_stop_string_is_ever_shown(codecs: dict[str, TextCodec], text: str, stop: str) -> None:
    """What was shown never has to be taken back, and at most the stop's length less one is held."""
    codec = codecs["byte_level"]
    stream = TextStream(codec.decoder(), [stop])
    shown = ""
    for index, symbol in enumerate(text):
        new, _ = stream.push([codec._tokenizer.token_to_id(symbol)])
        shown += new
        if stream.finished:
            break
        assert index + 1 - len(shown) <= len(stop) - 1
    whole = text[: text.find(stop)] if stop in text else text
    assert whole.startswith(shown)


def test_min_tokens_lets_early_matches_pass(codecs: dict[str, TextCodec]) -> None:
    """A match complete within min_tokens is plain text, also one of the last of them; the next one counts."""
    codec = codecs["byte_level"]
    token_ids = [codec._tokenizer.token_to_id(symbol) for symbol in "abXcdX"]
    for min_tokens in (3, 4):
        stream = TextStream(codec.decoder(), ["X"], min_tokens=min_tokens)
        assert run(stream, [token_ids]) == ("abXcd", 6)


def test_a_stop_token_is_silent_when_asked(codecs: dict[str, TextCodec]) -> None:
    """The text of a stop token is left out of the completion."""
    codec = codecs["byte_level"]
    a, b = (codec._tokenizer.token_to_id(symbol) for symbol in "ab")
    assert TextStream(codec.decoder()).push([a, b], silent_last=True) == ("a", 2)
    assert TextStream(codec.decoder(), ["zz"]).push([a, b], silent_last=True) == ("a", 2)


def test_special_tokens_are_not_text(codecs: dict[str, TextCodec]) -> None:
    """The end token is a token, not text; it ends texts."""
    codec = codecs["byte_level"]
    a = codec._tokenizer.token_to_id("a")
    assert TextStream(codec.decoder()).push([a, 1]) == ("a", 2)
    assert codec.eos_token_ids == {1}
    assert codecs["byte_fallback"].eos_token_ids == {2}


async def test_chat_templates_render(codecs: dict[str, TextCodec]) -> None:
    """Messages become the template's text; an open last message is continued."""
    codec = codecs["byte_level"]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well "}]
    whole = await codec.encode_chat(messages)
    opened = await codec.encode_chat(messages, continue_final=True)
    assert codec.decode(np.frombuffer(whole, "<u4").tolist()) == "<user>hi\n<assistant>well \n<assistant>"
    assert codec.decode(np.frombuffer(opened, "<u4").tolist()) == "<user>hi\n<assistant>well"


async def test_templates_refuse_in_words(codecs: dict[str, TextCodec]) -> None:
    """A template's own refusal, and a missing template, are the caller's errors."""
    with pytest.raises(InvalidArgument, match="no robots"):
        await codecs["byte_level"].encode_chat([{"role": "robot", "content": "x"}])
    with pytest.raises(InvalidArgument, match="no chat template"):
        await codecs["word_piece"].encode_chat([{"role": "user", "content": "x"}])


async def test_encoding_does_not_block_the_loop_and_is_bounded(tmp_path: Path) -> None:
    """Long texts are encoded by threads; beyond the queue more are refused."""
    codec = TextCodec(write_byte_level(tmp_path / "t"), threads=1, queue=2)
    texts = ["word " * 20_000 for _ in range(2)]
    tasks = [asyncio.create_task(codec.encode(text)) for text in texts]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted, match="wait to be tokenized"):
        await codec.encode("more")
    assert all(len(ids) > 100_000 for ids in await asyncio.gather(*tasks))
    codec.close()


def test_sampling_defaults_are_what_the_model_recommends(tmp_path: Path) -> None:
    """generation_config.json says how to sample when a request does not; what is no number is left out."""
    directory = write_byte_level(tmp_path / "model")
    assert TextCodec(directory).sampling_defaults == {}
    recommended = {"temperature": 0.6, "top_k": 20, "top_p": None, "do_sample": True, "repetition_penalty": 1}
    (directory / "generation_config.json").write_text(json.dumps(recommended))
    assert TextCodec(directory).sampling_defaults == {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.0}


@pytest.mark.parametrize("family", ["byte_level", "byte_fallback", "word_piece"])
def test_tokens_by_themselves(codecs: dict[str, TextCodec], family: str) -> None:
    """The bytes of tokens put together are the text, a special token is spelt out, an unknown one is empty."""
    codec = codecs[family]
    ids = np.frombuffer(asyncio.run(codec.encode("the cat", special_tokens=False)), dtype="<u4").tolist()
    spelt = b"".join(codec.token_bytes(token_id) for token_id in ids).decode()
    assert spelt.strip().replace(" ", "") == "thecat"
    assert codec.token_bytes(10**6) == b""
