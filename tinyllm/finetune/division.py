"""Which conversations SFT and LoRA learn from, and which are held out to validate.

Neither depends on how much was downloaded: a topic decides the part, a hash of the question the
split.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from tinyllm.corpus.sources import Source
from tinyllm.errors import DataError
from tinyllm.finetune.conversations import PARTS, SPLITS, Conversation, Part, Split
from tinyllm.finetune.reading import FORMATS


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatParams:
    """The `chat` section of params.yaml."""

    sources: dict[str, Source]
    """By a name of your choice; `format` is yaml (ChatterBot's form) or jsonl (`messages`)."""
    alternative_topics: tuple[str, ...]
    """Topics whose lists are one question and several answers to it, not a dialogue."""
    lora_topics: tuple[str, ...]
    """Topics for LoRA; SFT takes the rest. A topic is a file's name without ending, or a source's
    name."""
    val_share: float
    """Of the conversations, by a hash of the first user turn: the answers to one question stay
    together."""
    max_tokens: int
    """Longest conversation; later exchanges go first, then the end of the answer, never its
    `<|end|>`."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        problems = [] if self.sources else ["sources: empty; name at least one source"]
        problems += [
            f"sources.{name}: use letters, digits, _ and - in a source's name"
            for name in self.sources
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)
        ]
        problems += [
            f"sources.{name}.format: {source.format!r} has no conversations; use yaml or jsonl"
            for name, source in self.sources.items()
            if source.format not in FORMATS
        ]
        if not 0 < self.val_share < 1:
            problems.append(f"val_share: a share above 0 and below 1, got {self.val_share}")
        if not self.lora_topics:
            problems.append("lora_topics: empty; name the topics that LoRA learns")
        if self.max_tokens < 8:
            problems.append(f"max_tokens: must be at least 8, got {self.max_tokens}")
        if problems:
            raise ValueError("\n".join(problems))


def is_held_out(conversation: Conversation, val_share: float) -> bool:
    """Return whether a conversation is for validation: a hash of its question, nothing else.

    Case and punctuation of the question do not count, so "Who are you" and "who are you?" stay
    together whichever files they are in and however many files there are.
    """
    key = " ".join(re.findall(r"\w+", conversation.question.casefold())) or conversation.question
    digest = sha256(key.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < val_share * 2**64


def divide(
    conversations: Sequence[Conversation], params: ChatParams
) -> dict[tuple[Part, Split], list[Conversation]]:
    """Return the conversations of each part and split.

    Raises:
        DataError: a topic that does not occur, or a part or split without a conversation.
    """
    if not conversations:
        raise DataError("chat: no conversation with an answer in chat.sources; name other files")
    known = {topic for conversation in conversations for topic in conversation.topics}
    for field in ("lora_topics", "alternative_topics"):
        for topic in getattr(params, field):
            if topic not in known:
                close = difflib.get_close_matches(topic, known, n=1)
                hint = (
                    f"did you mean {close[0]}?"
                    if close
                    else f"there are {', '.join(sorted(known))}"
                )
                raise DataError(f"chat.{field}: no conversations of {topic!r}; {hint}")
    divided: dict[tuple[Part, Split], list[Conversation]] = {
        (part, split): [] for part in PARTS for split in SPLITS
    }
    for conversation in conversations:
        part: Part = "lora" if set(conversation.topics) & set(params.lora_topics) else "sft"
        split: Split = "val" if is_held_out(conversation, params.val_share) else "train"
        divided[part, split].append(conversation)
    for (part, split), found in divided.items():
        if not found:
            whole = len(divided[part, "train"]) + len(divided[part, "val"])
            way = "change chat.val_share" if whole else "change chat.lora_topics or chat.sources"
            raise DataError(
                f"chat: no {split} conversations for {part}, which has {whole} in all; {way}"
            )
    return divided
