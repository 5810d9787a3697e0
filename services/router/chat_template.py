"""The model's chat template, run in a sandbox."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.common.errors import InvalidArgument

Message = Mapping[str, str]
"""Keys "role" and "content"."""


class ChatTemplate:
    """Renders conversations to text."""

    def __init__(self, source: "str | list[dict[str, str]]", special_tokens: Mapping[str, str]) -> None:
        """Compile a template.

        Args:
            source: the template, or named ones of which "default" is used.
            special_tokens: variables such as bos_token.
        """
        if not isinstance(source, str):
            source = next((entry["template"] for entry in source if entry.get("name") == "default"), "")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

    @staticmethod
    def missing() -> InvalidArgument:
        """Return the error of a model without a template."""
        return InvalidArgument("chat: the model has no chat template; send text or tokens", reason="NO_CHAT_TEMPLATE")

    def render(self, messages: Sequence[Message], *, continue_final: bool) -> str:
        """Return the text of a conversation, ready for the model's answer.

        Args:
            continue_final: end with the last message's content, left open, instead of opening a new message.

        Raises:
            InvalidArgument: the template refuses the messages.
        """
        try:
            text = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=not continue_final,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise InvalidArgument(f"chat.messages: the chat template refuses them: {error}") from error
        if not continue_final:
            return text
        final = messages[-1]["content"].strip()
        end = text.rfind(final)
        if not final or end < 0:
            raise InvalidArgument("chat.continue_final_message: the chat template changes the last message")
        return text[: end + len(final)]


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.datetime.now(tz=datetime.UTC).strftime(format)
