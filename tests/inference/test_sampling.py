"""Each filter against the same one in Hugging Face transformers."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tinyllm.inference.sampling import (
    SamplingParams,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_logits,
    penalise_repetition,
    sample,
    token_logprob,
)

IDS = torch.tensor([[3, 3, 7, 11], [0, 1, 2, 2]])


def random_logits(seed: int = 0, vocab: int = 50) -> torch.Tensor:
    return torch.randn(2, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def seen(vocab: int = 50) -> torch.Tensor:
    mask = torch.zeros(2, vocab, dtype=torch.bool)
    return mask.scatter(1, IDS, torch.ones_like(IDS, dtype=torch.bool))


@pytest.mark.parametrize("k", [1, 2, 10, 50, 1000])
def test_top_k_equals_transformers(k):
    assert torch.equal(keep_top_k(random_logits(), k), TopKLogitsWarper(k)(IDS, random_logits()))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_equals_transformers(p):
    for seed in range(5):
        logits = random_logits(seed)
        assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(IDS, logits))


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("vocab", [300, 6000])
def test_top_p_keeps_the_fewest_tokens(vocab, p):
    """Where a few, some or many hold so much; sums of 6000 fp32 numbers are right to 2e-6."""
    for spread in (0.1, 1.0, 9.0):
        logits = random_logits(vocab=vocab) * spread / 3
        odds, kept = logits.double().softmax(-1), keep_top_p(logits, p).isfinite()
        for odds_V, kept_V in zip(odds, kept, strict=True):
            held, least = odds_V[kept_V].sum(), odds_V[kept_V].min()
            assert held > p - 2e-6
            assert held - least < p + 2e-6
            assert odds_V[~kept_V].numel() == 0 or odds_V[~kept_V].max() <= least


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5, 1.0])
def test_min_p_equals_transformers(min_p):
    for seed in range(5):
        logits = random_logits(seed)
        assert torch.equal(keep_min_p(logits, min_p), MinPLogitsWarper(min_p)(IDS, logits))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty_equals_transformers(penalty):
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(IDS, random_logits())
    assert torch.equal(penalise_repetition(random_logits(), seen(), penalty), theirs)


def test_all_together_in_the_order_of_transformers():
    params = SamplingParams(
        temperature=0.7,
        top_k=20,
        top_p=0.9,
        min_p=0.02,
        repetition_penalty=1.2,
        max_new_tokens=1,
    )
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.02),
        ]
    )
    for seed in range(10):
        logits = random_logits(seed)
        assert torch.equal(next_logits(logits, seen(), params), theirs(IDS, logits.clone()))


def test_greedy_is_argmax_whatever_the_filters():
    params = SamplingParams(top_k=3, top_p=0.5, min_p=0.1, seed=4, max_new_tokens=1)
    drawn = sample(random_logits(), seen(), params, torch.Generator())
    assert drawn == random_logits().argmax(-1).tolist()


def test_draws_follow_the_probabilities_and_the_seed():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().expand(20000, 4)
    params = SamplingParams(temperature=1.0, max_new_tokens=1)
    first, again, other = (
        sample(logits, None, params, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    shares = torch.tensor(first).bincount(minlength=4) / 20000
    # 4 sigma of a binomial with n = 20000, p = 0.4 is 0.014
    assert (shares - torch.tensor([0.1, 0.2, 0.3, 0.4])).abs().max() < 0.014


def test_what_has_no_odds_is_never_drawn(monkeypatch):
    odds = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0]]).expand(20000, 5)
    shares = torch.tensor(draw(odds, torch.Generator())).bincount(minlength=5) / 20000
    assert shares[[0, 2, 4]].tolist() == [0, 0, 0]
    assert abs(shares[1] - 0.75) < 4 * (0.75 * 0.25 / 20000) ** 0.5  # 4 sigma
    for broken in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            draw(torch.tensor([[0.5, broken, 0.5]]), torch.Generator())
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, **_: torch.zeros(*size, dtype=dtype))
    assert draw(odds[:1], None) == [1]  # the least number there is


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature: must be at least 0, got -0.1"),
        ({"top_k": -1}, "top_k: must be at least 0"),
        ({"top_p": 0.0}, "top_p: must be above 0"),
        ({"min_p": 1.5}, "min_p: must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: must be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
        ({"temperature": float("nan")}, "temperature: must be at least 0, got nan"),
    ],
)
def test_meaningless_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{"max_new_tokens": 1, **values})


def test_logprobs_are_the_raw_log_softmax():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    told = token_logprob(logits, 7, 3)
    exact = torch.log(torch.exp(logits.double()) / torch.exp(logits.double()).sum())
    assert told.logprob == pytest.approx(float(exact[7]), abs=1e-6)
    best = exact.argsort(descending=True)[:3]
    assert [token for token, _ in told.top] == best.tolist()
    assert [p for _, p in told.top] == pytest.approx(exact[best].tolist(), abs=1e-6)
    assert token_logprob(logits, 7, 0).top == ()
