"""From conversations to batches: ids, targets on answers only, several conversations in one row.

The labels are shifted here, once: target t is id t + 1 where that one is learned, else ignored.

    B  rows of a batch    T  tokens of a row
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinyllm.errors import DataError
from tinyllm.finetune.conversations import Conversation
from tinyllm.shards.batches import IGNORED, Batch
from tinyllm.tokenizer.chat import ChatTemplate
from tinyllm.tokenizer.tokenizer import Tokenizer

NO_CONVERSATION = -1
"""Document id of the padding behind the last conversation of a row."""


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation as the model sees it."""

    ids: NDArray[np.int64]
    """(N,) inputs: all tokens but the last."""
    targets: NDArray[np.int64]
    """(N,) the token after each input if the assistant says it, else `IGNORED`."""

    @property
    def answer_ids(self) -> NDArray[np.int64]:
        """The learned tokens: answers with their ends."""
        answers: NDArray[np.int64] = self.targets[self.targets != IGNORED]
        return answers


def encode_conversation(
    conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer, max_tokens: int
) -> Example | None:
    """Return a conversation as an example of at most `max_tokens` tokens, or None without room.

    What is too long loses its last exchanges; a first exchange that is too long loses the end of
    its answer. The token that ends the turn is always kept: without it the model would learn to go
    on. None: not even one token of the first answer fits behind its question.
    """
    messages = list(conversation.messages)
    ids, learned = template.encode(messages, tokenizer)
    while len(ids) > max_tokens and sum(m.role == "assistant" for m in messages) > 1:
        messages = messages[:-2]
        ids, learned = template.encode(messages, tokenizer)
    n_tokens = len(learned) - learned[::-1].index(True)  # nothing behind the last end is learned
    ids, learned = ids[:n_tokens], learned[:n_tokens]
    if n_tokens > max_tokens:
        ids = [*ids[: max_tokens - 1], ids[-1]]
        learned = [*learned[: max_tokens - 1], True]
        if not learned[-2]:
            return None
    everything = np.array(ids, dtype=np.int64)
    targets = np.where(np.array(learned[1:], dtype=bool), everything[1:], IGNORED)
    return Example(everything[:-1], targets)


def encode_conversations(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    max_tokens: int,
) -> list[Example]:
    """Return the examples of all conversations that have room; see `encode_conversation`."""
    examples = (encode_conversation(c, template, tokenizer, max_tokens) for c in conversations)
    return [example for example in examples if example is not None]


def pack(examples: Sequence[Example], order: Iterable[int], seq_len: int) -> list[list[int]]:
    """Return rows of examples by index: each row takes the next ones while they fit.

    Args:
        examples: none is longer than `seq_len`.
        order: indices into `examples`.
        seq_len: T.
    """
    rows: list[list[int]] = []
    room = 0
    for i in order:
        n_tokens = len(examples[i].ids)
        if n_tokens > room:
            rows.append([])
            room = seq_len
        rows[-1].append(i)
        room -= n_tokens
    return rows


def build_batch(rows: Sequence[Sequence[Example]], seq_len: int, pad_id: int) -> Batch:
    """Return rows of examples as arrays, (rows, T).

    Each example is a document of its own: it attends to nothing outside, and its positions begin at
    0. Padding is a document too, and never a target.
    """
    shape = (len(rows), seq_len)
    ids = np.full(shape, pad_id, dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
    documents = np.full(shape, NO_CONVERSATION, dtype=np.int64)
    for r, row in enumerate(rows):
        start = 0
        for document, example in enumerate(row):
            end = start + len(example.ids)
            ids[r, start:end] = example.ids
            targets[r, start:end] = example.targets
            documents[r, start:end] = document
            start = end
    return Batch(ids, targets, documents)


class ChatBatches:
    """Rows of packed conversations; each epoch has an order, so a packing, of its own.

    Batch i is a pure function of (seed, i): a resumed run needs no reader's state.
    """

    def __init__(
        self, examples: Sequence[Example], seq_len: int, batch_size: int, seed: int, pad_id: int
    ) -> None:
        """Prepare.

        Args:
            examples: at least one, none longer than `seq_len`.
            seq_len: T.
            batch_size: B.
            seed: of the orders.
            pad_id: fills the end of a row.

        Raises:
            DataError: there is no example, or one does not fit into a row.
        """
        if not examples:
            raise DataError("chat: no conversation to learn from; see reports/chat_data")
        longest = max(len(example.ids) for example in examples)
        if longest > seq_len:
            raise DataError(
                f"chat: a conversation has {longest + 1} tokens, a row of seq_len {seq_len} takes"
                f" {seq_len + 1}; raise seq_len or lower chat.max_tokens"
            )
        self._examples, self._seq_len, self._batch_size = examples, seq_len, batch_size
        self._seed, self._pad_id = seed, pad_id
        self._first_row = [0]  # of each epoch met so far, counted from the start of training
        self._rows: tuple[int, list[list[int]]] = (-1, [])

    def batch(self, index: int) -> Batch:
        """Return micro-batch `index`, counted from 0."""
        first = index * self._batch_size
        rows = [self._row(first + i) for i in range(self._batch_size)]
        return build_batch(rows, self._seq_len, self._pad_id)

    def rows_of_epoch(self, epoch: int) -> list[list[int]]:
        """Return the rows of an epoch: every example once, by index."""
        if self._rows[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._examples))
            self._rows = (epoch, pack(self._examples, order.tolist(), self._seq_len))
        return self._rows[1]

    def _row(self, row: int) -> list[Example]:
        """Return the examples of a row, counted from the start of training."""
        while self._first_row[-1] <= row:
            epoch = len(self._first_row) - 1
            self._first_row.append(self._first_row[-1] + len(self.rows_of_epoch(epoch)))
        epoch = int(np.searchsorted(self._first_row, row, side="right")) - 1
        indices = self.rows_of_epoch(epoch)[row - self._first_row[epoch]]
        return [self._examples[i] for i in indices]


def count(conversations: Sequence[Conversation], examples: Sequence[Example]) -> dict[str, int]:
    """Return what a split amounts to: conversations, turns, tokens, tokens that are learned."""
    return {
        "conversations": len(conversations),
        "turns": sum(len(conversation.messages) for conversation in conversations),
        "tokens": sum(len(example.ids) + 1 for example in examples),
        "supervised_tokens": sum(len(example.answer_ids) for example in examples),
    }
