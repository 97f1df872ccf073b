"""What a training run shows on its way: the loss on a small part of a split, a sample of text.

The whole split takes seconds per evaluation; it is for the end.
"""

import numpy as np

from tinyllm.evaluation.loss import LossReport, Precision, evaluate_stream
from tinyllm.inference.generate import generate
from tinyllm.inference.sampling import SamplingParams
from tinyllm.model.transformer import Transformer
from tinyllm.shards.reader import TokenShards
from tinyllm.shards.stream import TokenStream
from tinyllm.tokenizer.special import END_OF_TEXT
from tinyllm.tokenizer.tokenizer import Tokenizer

BATCH_TOKENS = 8192
PROBE_TOKENS = 16384
SAMPLING = SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_new_tokens=160)


class Probe(TokenShards):
    """Windows spread evenly over a split, in a row; all of it if it is not larger.

    Where two windows meet, a token is predicted from a foreign context: one in `seq_len`.
    """

    def __init__(
        self, shards: TokenShards, tokenizer: Tokenizer, seq_len: int, precision: Precision
    ) -> None:
        """Choose the windows.

        Args:
            shards: the split.
            tokenizer: that wrote it; counts the bytes of the chosen tokens.
            seq_len: tokens per window.
            precision: of the evaluation.
        """
        total = len(shards.stream)
        tokens = shards.stream.read(0, min(total, PROBE_TOKENS))
        if total > PROBE_TOKENS:
            n_windows = max(1, PROBE_TOKENS // seq_len)
            starts = np.linspace(0, total - seq_len, n_windows, dtype=np.int64)
            tokens = np.concatenate([shards.stream.read(at, at + seq_len) for at in starts])
        self.stream = TokenStream([tokens.astype(np.uint32)], f"part of {shards.stream.name}")
        self.n_tokens, self.vocab_size = len(tokens), shards.vocab_size
        self.n_bytes = tokenizer.n_bytes(tokens.tolist())
        self.seq_len, self.precision = seq_len, precision

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Return `val_loss` and `val_bpb` of the part."""
        report = evaluate_split(model, self, self.seq_len, self.precision)
        return {"val_loss": report.val_loss, "val_bpb": report.val_bpb}


def evaluate_split(
    model: Transformer, shards: TokenShards, seq_len: int, precision: Precision
) -> LossReport:
    """Return the report of a split with windows as long as in training."""
    return evaluate_stream(
        model, shards, seq_len=seq_len, batch_tokens=BATCH_TOKENS, precision=precision
    )


def sample_text(model: Transformer, tokenizer: Tokenizer) -> str:
    """Return a text that the model begins by itself; the same draws each time."""
    end = tokenizer.id_of(END_OF_TEXT)
    return tokenizer.decode(generate(model, [end], SAMPLING, [end]))
