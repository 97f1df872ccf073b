"""A model directory opened for use: the model with its own tokenizer and chat template."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tinyllm.artifact import load_manifest
from tinyllm.errors import ArtifactError
from tinyllm.inference.conversation import Conversation, stop_ids, stream_text
from tinyllm.inference.drafts import Draft
from tinyllm.inference.generate import generate
from tinyllm.inference.sampling import SamplingParams
from tinyllm.inference.speculative import speculate
from tinyllm.model.directory import CONFIG, TOKENIZER, stored_as
from tinyllm.model.init import count_parameters
from tinyllm.model.transformer import Transformer
from tinyllm.tokenizer.chat import ChatTemplate
from tinyllm.tokenizer.special import END_OF_TEXT
from tinyllm.tokenizer.tokenizer import Tokenizer

MERGED = "merged"
N_DRAFT = 4
"""Guesses per pass of the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """Everything that is needed to produce text."""

    model: Transformer
    tokenizer: Tokenizer
    template: ChatTemplate
    kind: str
    """The artifact's kind: pretrain, sft, lora, int8."""
    stored_as: str
    """What its weights are: float, int8, int4."""
    directory: Path

    @property
    def description(self) -> str:
        """What it is, in a few words."""
        what = self.stored_as
        if not self.is_quantized:  # whose numbers are no parameters any more
            what = f"{self.kind}, {count_parameters(self.model) / 1e6:.1f} M parameters"
        return f"{self.directory}: {what}, context {self.model.config.max_seq_len}"

    @property
    def is_quantized(self) -> bool:
        """Whether its weights are stored in INT8 or 4 bits."""
        return self.stored_as != "float"

    def continue_text(
        self, prompt: str, sampling: SamplingParams, draft: Draft | None = None
    ) -> Iterator[str]:
        """Yield what follows a text, piece by piece; an empty one means the begin of a document.

        Args:
            prompt: any text.
            sampling: how tokens are chosen.
            draft: guesses ahead; the text is the same without it.

        Raises:
            DataError: the prompt does not fit into the model's context.
        """
        ids = self.tokenizer.encode(prompt) or [self.tokenizer.id_of(END_OF_TEXT)]
        ends = stop_ids(self.tokenizer)
        if draft is None:
            return stream_text(generate(self.model, ids, sampling, ends), self.tokenizer)
        tokens = speculate(self.model, ids, sampling, ends, draft, n_draft=N_DRAFT)
        return stream_text(tokens, self.tokenizer)

    def converse(self, system: str | None = None) -> Conversation:
        """Return a new conversation."""
        return Conversation(self.model, self.tokenizer, self.template, system)


def open_session(
    directory: Path, load_model: Callable[[Path], Transformer], device: torch.device
) -> Session:
    """Open a model directory.

    Args:
        directory: a model directory, or one that has a `merged` model in it, as LoRA's.
        load_model: reads its weights and checks every file against the manifest.
        device: where to compute.

    Raises:
        ArtifactError: it is not a model directory, is damaged, or has another model's tokenizer.
    """
    if not directory.is_dir():
        raise ArtifactError(
            f"{directory}: no such folder; name a model directory or build it with `dvc repro`"
        )
    if not (directory / CONFIG).is_file() and (directory / MERGED / CONFIG).is_file():
        directory = directory / MERGED
    model = load_model(directory)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ArtifactError(
            f"{directory / TOKENIZER}: has {tokenizer.vocab_size} tokens, the model"
            f" {model.config.vocab_size}; it is another model's, rebuild with `dvc repro`"
        )
    return Session(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        template=ChatTemplate.load(directory),
        kind=load_manifest(directory).kind,
        stored_as=stored_as(directory),
        directory=directory,
    )
