"""The demo model's tokenizer and chat format."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from demo.tokenizer import (
    BOS,
    BOS_ID,
    CHAT_TEMPLATE,
    EOS,
    EOS_ID,
    PAD_ID,
    SPECIAL_TOKENS,
    save_tokenizer,
    train_tokenizer,
)

TOKENIZER = train_tokenizer(["Return the name of the file.", "The file is closed after the with statement."] * 20, 400)


def render(messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string(CHAT_TEMPLATE)
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt, bos_token=BOS, eos_token=EOS)


@given(st.text())
def test_any_text_survives_a_round_trip(text: str) -> None:
    """Byte-level BPE decodes to what was encoded, whatever the script."""
    text = "".join(part for part in text if part not in "<|>")  # special tokens are not text
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_special_tokens_come_first() -> None:
    """Special tokens have the ids that the model's configuration names."""
    assert [TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert (TOKENIZER.token_to_id("<pad>"), TOKENIZER.token_to_id(BOS), TOKENIZER.token_to_id(EOS)) == (
        PAD_ID,
        BOS_ID,
        EOS_ID,
    )


def test_text_starts_with_bos() -> None:
    """A plain prompt gets BOS once; a rendered conversation brings its own."""
    assert TOKENIZER.encode("the file").ids[0] == BOS_ID
    conversation = TOKENIZER.encode(render([{"role": "user", "content": "the file"}]), add_special_tokens=False).ids
    assert conversation.count(BOS_ID) == 1
    assert conversation[0] == BOS_ID


def test_conversation_is_rendered_with_tags() -> None:
    """Each turn has its role's tag and ends with EOS; the assistant's turn is left open to be generated."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " What is a file? "}]
    assert render(messages) == "<s><|system|>Be brief.</s><|user|>What is a file?</s><|assistant|>"
    assert render(messages[1:], add_generation_prompt=False) == "<s><|user|>What is a file?</s>"


def test_unknown_role_is_refused() -> None:
    """A role that the model never saw is an error, not silently a tag of noise."""
    with pytest.raises(TemplateError, match="system, user and assistant"):
        render([{"role": "tool", "content": "42"}])


def test_saved_tokenizer_loads(tmp_path: Path) -> None:
    """The saved files hold the same tokenizer, and the chat template where servers look for it."""
    save_tokenizer(TOKENIZER, tmp_path, context_tokens=2048)
    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    config: dict[str, Any] = json.loads((tmp_path / "tokenizer_config.json").read_text())
    text = "<s><|user|>Return the file.</s>"
    assert loaded.encode(text).ids == TOKENIZER.encode(text).ids
    assert config["chat_template"] == CHAT_TEMPLATE
    assert (config["bos_token"], config["eos_token"]) == (BOS, EOS)
