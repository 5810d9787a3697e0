"""Log-probabilities in both shapes."""

import math

from ascendra import PositionLogprobs, TokenLogprob
from services.gateway.logprobs import Speller, chat_logprobs, id_name, joined, mentioned_ids, text_logprobs

NEVER = PositionLogprobs(TokenLogprob(7, -math.inf, 9), (TokenLogprob(8, -0.1, 1), TokenLogprob(9, -3.0, 2)))


def test_the_sampled_token_is_among_the_likeliest_of_a_completion() -> None:
    """Also when it was not one of them; minus infinity is a number that JSON has."""
    columns = text_logprobs(NEVER, {7: "a", 8: "bb", 9: "c"}.__getitem__, 10)
    assert columns == {
        "tokens": ["a"],
        "token_logprobs": [-9999.0],
        "top_logprobs": [{"a": -9999.0, "bb": -0.1, "c": -3.0}],
        "text_offset": [10],
    }
    assert joined([columns, columns]) == {name: values * 2 for name, values in columns.items()}
    assert joined([]) is None


def test_chat_lists_only_the_likeliest() -> None:
    """The sampled token stands beside them, with its bytes."""
    content = chat_logprobs(NEVER, {7: "é", 8: "b", 9: "c"}.__getitem__)["content"][0]
    assert (content["token"], content["logprob"], content["bytes"]) == ("é", -9999.0, [0xC3, 0xA9])
    assert [top["token"] for top in content["top_logprobs"]] == ["b", "c"]


def test_names_by_id() -> None:
    """Every token can be named without its text."""
    assert mentioned_ids([NEVER]) == [7, 8, 9]
    assert text_logprobs(NEVER, id_name, 0)["tokens"] == ["token_id:7"]


def test_a_character_is_spelt_with_its_last_token() -> None:
    """Half a character has no text; the next position knows of it."""
    tokens = {1: b"caf", 2: b"\xc3", 3: b"\xa9"}
    speller = Speller()
    spelt = []
    for token_id in (1, 2, 3):
        spelt.append(speller.name_in(tokens)(token_id))
        speller.advance(tokens[token_id])
    assert spelt == ["caf", "", "é"]
