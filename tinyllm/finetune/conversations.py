"""Conversations as values and as JSON lines, the form in which data/chat holds them.

Where they come from is the business of `reading.py`, who learns from which of `division.py`, which
tokens are learned of `examples.py`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinyllm.errors import DataError
from tinyllm.tokenizer.chat import Message

Part = Literal["sft", "lora"]
"""Which stage learns from a conversation."""
Split = Literal["train", "val"]
PARTS: tuple[Part, ...] = ("sft", "lora")
SPLITS: tuple[Split, ...] = ("train", "val")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A dialogue that ends with an answer: user, assistant, user, assistant, ..."""

    name: str
    """`<source>/<topic>/<number>`, unique."""
    messages: tuple[Message, ...]
    """Perhaps one system message, then user and assistant in turn."""

    @property
    def topics(self) -> tuple[str, str]:
        """The names that `lora_topics` may use for it: the source's and the file's."""
        source, topic, _ = self.name.split("/")
        return source, topic

    @property
    def question(self) -> str:
        """The first user turn."""
        return next(message.content for message in self.messages if message.role == "user")


def conversations_path(chat: Path, part: Part, split: Split) -> Path:
    """Return the file of one part and split in the artifact of `chat_data`."""
    return chat / part / f"{split}.jsonl"


def write_conversations(path: Path, conversations: Iterable[Conversation]) -> None:
    """Write one JSON object per line: name and messages."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for conversation in conversations:
            messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
            row = {"name": conversation.name, "messages": messages}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def load_conversations(path: Path) -> list[Conversation]:
    """Read what `write_conversations` wrote.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [
            Conversation(row["name"], tuple(Message(**message) for message in row["messages"]))
            for row in rows
        ]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; build it with `dvc repro chat_data`") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: damaged; rebuild it with `dvc repro --force chat_data`") from None
