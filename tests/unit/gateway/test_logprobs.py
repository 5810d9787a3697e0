"""Log-probabilities in both shapes."""

import math

from ascendra import PositionLogprobs, TokenLogprob
from services.gateway.logprobs import IdNames, chat_logprobs, mentioned_ids, text_logprobs

NEVER = PositionLogprobs(TokenLogprob(7, -math.inf, 9), (TokenLogprob(8, -0.1, 1), TokenLogprob(9, -3.0, 2)))


def test_the_sampled_token_is_among_the_likeliest_of_a_completion() -> None:
    """Also when it was not one of them; minus infinity is a number that JSON has."""
    columns = text_logprobs([NEVER], {7: "a", 8: "bb", 9: "c"}, 10)
    assert columns == {
        "tokens": ["a"],
        "token_logprobs": [-9999.0],
        "top_logprobs": [{"a": -9999.0, "bb": -0.1, "c": -3.0}],
        "text_offset": [10],
    }


def test_chat_lists_only_the_likeliest() -> None:
    """The sampled token stands beside them, with its bytes."""
    content = chat_logprobs([NEVER], {7: "é", 8: "b", 9: "c"})["content"][0]
    assert (content["token"], content["logprob"], content["bytes"]) == ("é", -9999.0, [0xC3, 0xA9])
    assert [top["token"] for top in content["top_logprobs"]] == ["b", "c"]


def test_names_by_id() -> None:
    """Every token can be named without its text."""
    assert mentioned_ids([NEVER]) == [7, 8, 9]
    assert text_logprobs([NEVER], IdNames(), 0)["tokens"] == ["token_id:7"]
