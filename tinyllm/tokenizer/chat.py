"""One form of a conversation for training, chatting, serving and every exported model.

The Jinja text is the only definition: `transformers` renders the same file. `encode` renders it
around placeholders, so that what people write is encoded as text and can never become a special
token, and so that the loss knows which tokens are the assistant's own.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tinyllm.errors import DataError
from tinyllm.tokenizer.special import END_OF_TURN
from tinyllm.tokenizer.tokenizer import Tokenizer, read_with

CHAT_TEMPLATE_FILE = "chat_template.jinja"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- '<|system|>' -}}
    {%- elif message['role'] == 'user' -%}
        {{- '<|user|>' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<|assistant|>' -}}
    {%- else -%}
        {{- raise_exception('unknown role ' ~ message['role']) -}}
    {%- endif -%}
    {{- message['content'] ~ '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""
"""What prune_vocab writes beside the tokenizer.

The special tokens stand there in one piece, so that transformers finds them and its
`apply_chat_template(..., sanitize_control_tokens=True)` keeps them out of what people write.
"""

_PLACEHOLDER = re.compile("\0([0-9]+)\0")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: str
    """What is said: plain text."""


class ChatTemplate:
    """A conversation's rendering, as text and as token ids."""

    def __init__(self, source: str = CHAT_TEMPLATE) -> None:
        """Compile a Jinja template.

        Raises:
            ValueError: it does not compile.
        """
        self.source = source
        # The options of transformers' apply_chat_template, so that both render the same text.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(str(error)) from None

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate":
        """Load the template of a tokenizer's or model's folder.

        Raises:
            ArtifactError: it is missing or does not compile.
        """
        return read_with(cls, folder / CHAT_TEMPLATE_FILE)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Return the conversation as text.

        Args:
            messages: the turns.
            add_generation_prompt: end with what makes the assistant speak.

        Raises:
            DataError: the template refuses the conversation.
        """
        plain: list[dict[str, Any]] = [
            {"role": message.role, "content": message.content} for message in messages
        ]
        try:
            return self._template.render(
                messages=plain, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise DataError(f"conversation: {error}; see {CHAT_TEMPLATE_FILE}") from None

    def encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation and which of them are learned.

        Args:
            messages: the turns.
            tokenizer: the one of the folder the template came from.
            add_generation_prompt: end with what makes the assistant speak.

        Returns:
            ids, and as many flags: true on the assistant's words and the end of its turn.

        Raises:
            DataError: the template refuses the conversation.
        """
        end, ids, learned, answering = tokenizer.id_of(END_OF_TURN), [], [], False
        for text, message in self._segments(messages, add_generation_prompt):
            part = tokenizer.encode(text, allow_special=message is None)
            if message is None:
                flags = [answering and i == 0 and part[0] == end for i in range(len(part))]
                answering = False
            else:
                answering = message.role == "assistant"
                flags = [answering] * len(part)
            ids += part
            learned += flags
        return ids, learned

    def _segments(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> Iterator[tuple[str, Message | None]]:
        """Yield the rendered text in pieces, each with the message whose content it is, or None."""
        hollow = [Message(message.role, f"\0{i}\0") for i, message in enumerate(messages)]
        rendered, at = self.render(hollow, add_generation_prompt), 0
        for match in _PLACEHOLDER.finditer(rendered):
            yield rendered[at : match.start()], None
            message = messages[int(match[1])]
            yield message.content, message
            at = match.end()
        yield rendered[at:], None


def _raise_exception(message: str) -> NoReturn:
    """Refuse a conversation from inside a template, as transformers lets templates do."""
    raise TemplateError(message)
