"""Rows of the pretraining text among the dialogues, so that a chat model still knows how to write.

Without them the loss forgets what it no longer sees: docs/sft.md has the figures with and without.
"""

from dataclasses import dataclass

import numpy as np

from tinyllm.shards.batches import Batch, Batches
from tinyllm.training.params import TrainingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTrainingParams(TrainingParams):
    """The `sft` section of params.yaml, and what `lora` shares with it."""

    replay_rows: int
    """Rows of each micro-batch that are pretraining text, of which every token is learned."""

    def problems(self) -> list[str]:
        """Return one line per refused field."""
        problems = TrainingParams.problems(self)
        if not 0 <= self.replay_rows < self.batch_size:
            problems.append(
                f"replay_rows: must be at least 0 and below batch_size = {self.batch_size},"
                f" got {self.replay_rows}"
            )
        return problems


class ReplayBatches:
    """Dialogues above, pretraining text below; a pure function of the index like both."""

    def __init__(self, chat: Batches, text: Batches) -> None:
        """Join two sources whose rows are equally long."""
        self._chat, self._text = chat, text

    def batch(self, index: int) -> Batch:
        """Return micro-batch `index`, counted from 0."""
        chat, text = self._chat.batch(index), self._text.batch(index)
        whole = np.zeros_like(text.ids)  # a row of text is one document
        documents = chat.document_ids if chat.document_ids is not None else np.zeros_like(chat.ids)
        return Batch(
            np.concatenate([chat.ids, text.ids]),
            np.concatenate([chat.targets, text.targets]),
            np.concatenate([documents, whole]),
        )
