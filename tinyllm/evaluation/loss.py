"""How well a model predicts held-out text: nats per token, perplexity, bits per byte.

Bits per byte of UTF-8 is the number to compare: it does not change when the same text is cut into
other tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from tinyllm.errors import DataError
from tinyllm.model.transformer import next_token_loss
from tinyllm.shards.batches import IGNORED
from tinyllm.shards.stream import TokenStream

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TokenSplit(Protocol):
    """What is evaluated; `tinyllm.shards.reader.TokenShards` is one."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the split."""

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text they stand for."""

    @property
    def stream(self) -> TokenStream:
        """All tokens in a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPart:
    """Some tokens of a split, as a split of its own."""

    stream: TokenStream
    n_bytes: int
    """UTF-8 bytes of the text they stand for."""

    @property
    def n_tokens(self) -> int:
        """How many there are."""
        return len(self.stream)


class LanguageModel(Protocol):
    """What is asked: `Transformer`, or anything with the same call."""

    rope_cos: Tensor
    """Any tensor of the model: it says on which device to compute."""

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Return the logits of every position, (B, T, V)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossReport:
    """What a split costs under a model."""

    val_loss: float
    """Mean of -ln p(token), nats per token."""
    val_bpb: float
    """Bits per UTF-8 byte of the text."""
    val_perplexity: float
    """exp(val_loss)."""
    n_tokens: int
    """Predicted tokens: all but the first."""
    n_bytes: int
    """UTF-8 bytes of the text."""

    @classmethod
    def from_nats(cls, nats: float, n_tokens: int, n_bytes: int) -> "LossReport":
        """Return the report of a sum of -ln p over `n_tokens` that stand for `n_bytes`."""
        loss = nats / n_tokens
        return cls(
            val_loss=loss,
            val_bpb=nats / math.log(2) / n_bytes,
            val_perplexity=math.exp(min(loss, 700.0)),  # exp(710) is beyond a double
            n_tokens=n_tokens,
            n_bytes=n_bytes,
        )


@torch.inference_mode()
def evaluate_stream(
    model: LanguageModel,
    shards: TokenSplit,
    *,
    seq_len: int,
    batch_tokens: int,
    precision: Precision,
    context: int = 0,
) -> LossReport:
    """Predict a whole split, window by window.

    Windows of `seq_len` inputs overlap by `context`; every token but the first of the split is
    predicted exactly once, from at most `seq_len` tokens before it, and from at least `context`
    where so many are before it.

    Args:
        model: in evaluation mode.
        shards: the split.
        seq_len: inputs per window.
        batch_tokens: tokens per forward pass, at least one window; it does not change the result
            beyond rounding.
        precision: bf16 and fp16 mean autocast.
        context: below `seq_len`; 0: windows follow each other without overlap.

    Raises:
        DataError: the split has fewer than two tokens.
    """
    if shards.n_tokens < 2 or shards.n_bytes < 1:
        raise DataError(
            "validation tokens: there are none; hold out more text"
            " (clean.val_documents, clean.val_share)"
        )
    device = model.rope_cos.device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    n_rows = max(1, batch_tokens // seq_len)
    narrow = precision != "fp32"
    with torch.autocast(device.type, _DTYPES[precision] if narrow else None, enabled=narrow):
        for ids, targets in _window_batches(shards, seq_len, context, n_rows):
            logits = model(ids.to(device))
            nats += next_token_loss(logits, targets.to(device)).double()
    return LossReport.from_nats(nats.item(), shards.n_tokens - 1, shards.n_bytes)


def _window_batches(
    shards: TokenSplit, seq_len: int, context: int, n_rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets, both (rows, seq_len); what is not scored has ignored targets."""
    n_inputs = shards.n_tokens - 1
    stride = seq_len - context
    starts = range(0, max(n_inputs - context, 1), stride)
    for first in range(0, len(starts), n_rows):
        rows = starts[first : first + n_rows]
        ids = np.zeros((len(rows), seq_len), dtype=np.int64)
        targets = np.full((len(rows), seq_len), IGNORED, dtype=np.int64)
        for row, start in enumerate(rows):
            tokens = shards.stream.read(start, min(start + seq_len, n_inputs) + 1)
            scored = context if start else 0  # what is before was scored by the window before
            ids[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, scored : len(tokens) - 1] = tokens[scored + 1 :]
        yield torch.from_numpy(ids), torch.from_numpy(targets)
