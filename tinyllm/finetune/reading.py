"""Read conversations from a source's files and clean them.

Two forms are read. `yaml`: ChatterBot's, a mapping whose `conversations` are lists of utterances
that alternate between user and assistant. `jsonl`: your own, one `{"messages": [{"role",
"content"}, ...]}` per line.
"""

import difflib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tinyllm.corpus.sources import Source
from tinyllm.errors import DataError
from tinyllm.finetune.conversations import Conversation
from tinyllm.tokenizer.chat import Message

FORMATS = ("yaml", "jsonl")
"""Of sources: the two forms above."""
ROLES = ("system", "user", "assistant")


def read_conversations(
    source_name: str,
    source: Source,
    members: Iterable[tuple[str, bytes]],
    alternative_topics: Sequence[str],
    dropped: Counter[str],
) -> Iterator[Conversation]:
    """Yield the conversations of a source's files.

    Args:
        source_name: begins their names.
        source: gives format and encoding.
        members: name and content of each file.
        alternative_topics: files whose lists are a question and alternative answers.
        dropped: counts by reason what is left out.

    Raises:
        DataError: a file is not of the format, or the roles of a conversation do not alternate.
    """
    counts: Counter[str] = Counter()
    for name, content in members:
        topic = PurePosixPath(name).name.partition(".")[0].replace("/", "_")
        try:
            text = content.decode(source.encoding)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}: not {source.encoding}: {error.reason}; set encoding"
            ) from None
        if source.format == "yaml":
            rows = _read_chatterbot(name, text, topic in alternative_topics, dropped)
        else:
            rows = _read_jsonl(name, text)
        for where, messages in rows:
            cleaned = clean_messages(messages, where)
            if cleaned is None:
                dropped["no_answer"] += 1
                continue
            yield Conversation(f"{source_name}/{topic}/{counts[topic]:06d}", cleaned)
            counts[topic] += 1


def clean_messages(messages: Sequence[Message], where: str) -> tuple[Message, ...] | None:
    """Return the messages in NFC without outer blanks, up to the last answer, or None without one.

    An empty message ends the conversation: what follows it answers nothing.

    Raises:
        DataError: the roles are not an optional system message, then user and assistant in turn.
    """
    cleaned: list[Message] = []
    for message in messages:
        paired = message.content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        content = unicodedata.normalize("NFC", paired).strip()
        cleaned.append(replace(message, content=content))
    dialogue = [message.role for message in cleaned]
    if dialogue[:1] == ["system"]:
        dialogue = dialogue[1:]
    for i, role in enumerate(dialogue):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise DataError(
                f"{where}: message {i + 1 + len(cleaned) - len(dialogue)} is {role!r},"
                f" {expected!r} expected; after an optional system message user and assistant"
                " take turns, user first"
            )
    end = next((i for i, message in enumerate(cleaned) if not message.content), len(cleaned))
    while end and cleaned[end - 1].role != "assistant":
        end -= 1
    return tuple(cleaned[:end]) or None


def drop_duplicates(
    conversations: Iterable[Conversation], dropped: Counter[str]
) -> Iterator[Conversation]:
    """Yield each sequence of messages once, the first one met."""
    seen: set[tuple[Message, ...]] = set()
    for conversation in conversations:
        if conversation.messages in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(conversation.messages)
        yield conversation


def _read_chatterbot(
    name: str, text: str, alternatives: bool, dropped: Counter[str]
) -> Iterator[tuple[str, list[Message]]]:
    """Yield where and what of each conversation in a ChatterBot file; every scalar is text."""
    try:
        document = YAML(typ="base", pure=True).load(text)
    except YAMLError as error:
        raise DataError(f"{name}: not readable as YAML: {' '.join(str(error).split())}") from None
    rows = document.get("conversations") if isinstance(document, Mapping) else None
    if not isinstance(rows, list):
        raise DataError(f"{name}: has no list `conversations`; see docs/chat-data.md for the form")
    for i, row in enumerate(rows):
        if not isinstance(row, list) or not all(isinstance(turn, str) for turn in row):
            dropped["malformed"] += 1  # the corpus itself has a few
            continue
        dialogues = [[row[0], answer] for answer in row[1:]] if alternatives else [row]
        for turns in dialogues:
            messages = [
                Message("assistant" if k % 2 else "user", turn) for k, turn in enumerate(turns)
            ]
            yield f"{name}: conversation {i + 1}", messages


def _read_jsonl(name: str, text: str) -> Iterator[tuple[str, list[Message]]]:
    """Yield where and what of each conversation in a JSON-lines file."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{name}:{number}"
            yield where, _parse_messages(line, where)


def _parse_messages(line: str, where: str) -> list[Message]:
    """Return the messages of one JSON line."""
    try:
        rows: Any = json.loads(line)["messages"]
        messages = [Message(row["role"], row["content"]) for row in rows]
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f'{where}: expected {{"messages": [{{"role": ..., "content": ...}}, ...]}}'
        ) from None
    for message in messages:
        if not isinstance(message.content, str):
            raise DataError(f"{where}: content is {type(message.content).__name__}, not text")
        if message.role not in ROLES:
            close = difflib.get_close_matches(str(message.role), ROLES, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise DataError(f"{where}: role {message.role!r} is not one of {_list(ROLES)}{hint}")
    return messages


def _list(words: Iterable[str]) -> str:
    """Return words as a message lists them."""
    return ", ".join(sorted(words))
