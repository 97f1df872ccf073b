import math

import numpy as np
import pytest
import torch
from tiny_lm import VOCAB, tiny_model

from tinyllm.errors import DataError
from tinyllm.evaluation.loss import LossReport, evaluate_stream
from tinyllm.shards.stream import TokenStream


class Tokens:
    def __init__(self, ids: np.ndarray) -> None:
        self.ids, self.n_tokens, self.n_bytes = ids, len(ids), 321
        self.stream = TokenStream([ids[:7], ids[7:]])  # two shards: windows cross the border


def tokens(n: int) -> Tokens:
    return Tokens(np.random.default_rng(0).integers(0, VOCAB, n).astype(np.uint16))


def nats_by_hand(model, stream: np.ndarray, seq_len: int, context: int) -> float:
    """One token at a time, in fp64, with a fresh forward pass for each."""
    ids, nats = torch.from_numpy(stream.astype(np.int64)), 0.0
    for i in range(1, len(ids)):
        beyond_the_first = max(i - seq_len, 0)  # one more window for each stride of them
        window_start = -(-beyond_the_first // (seq_len - context)) * (seq_len - context)
        with torch.no_grad():
            logits = model(ids[None, window_start:i])[0, -1].double()
        nats -= logits.log_softmax(-1)[ids[i]].item()
    return nats


@pytest.mark.parametrize("context", [0, 4, 7])
@pytest.mark.parametrize("n", [2, 9, 16, 17, 18, 50])
def test_every_token_but_the_first_counts_once(n, context):
    model, split = tiny_model(), tokens(n)
    settings = {"batch_tokens": 16, "precision": "fp32", "context": context}
    report = evaluate_stream(model, split, seq_len=8, **settings)
    nats = nats_by_hand(model, split.ids, 8, context)
    assert report.n_tokens == n - 1
    assert report.n_bytes == 321
    assert report.val_loss == pytest.approx(nats / (n - 1), rel=1e-5)
    assert report.val_bpb == pytest.approx(nats / math.log(2) / 321, rel=1e-5)
    assert report.val_perplexity == pytest.approx(math.exp(nats / (n - 1)), rel=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 8, 24, 10000])
def test_the_batch_size_does_not_matter(batch_tokens):
    model, split = tiny_model(), tokens(61)
    report = evaluate_stream(model, split, seq_len=8, batch_tokens=batch_tokens, precision="fp32")
    whole = evaluate_stream(model, split, seq_len=8, batch_tokens=16, precision="fp32")
    assert report.val_loss == pytest.approx(whole.val_loss, rel=1e-6)


def test_a_uniform_model_costs_log_v():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    report = evaluate_stream(model, tokens(33), seq_len=8, batch_tokens=16, precision="fp32")
    assert report.val_loss == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert report.val_perplexity == pytest.approx(VOCAB, rel=1e-5)
    assert report.val_bpb == pytest.approx(32 * math.log2(VOCAB) / 321, rel=1e-6)


def test_bf16_is_near_and_not_equal():
    model, split = tiny_model(), tokens(100)
    exact, rounded = (
        evaluate_stream(model, split, seq_len=8, batch_tokens=64, precision=precision).val_loss
        for precision in ("fp32", "bf16")
    )
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=2**-6)


@pytest.mark.parametrize("n", [0, 1])
def test_an_empty_split_is_told_in_one_line(n):
    with pytest.raises(DataError, match="validation tokens: there are none; hold out more text"):
        evaluate_stream(tiny_model(), tokens(n), seq_len=8, batch_tokens=8, precision="fp32")


def test_a_hopeless_loss_stays_a_number():
    assert math.isfinite(LossReport.from_nats(1e6, 10, 10).val_perplexity)
