"""Guesses change the speed, never the text or its distribution."""

from collections import Counter

import pytest
import torch
from tiny_lm import tiny_model

from tinyllm.errors import DataError
from tinyllm.inference.drafts import LookupDraft, ModelDraft, first_layers
from tinyllm.inference.generate import generate
from tinyllm.inference.sampling import SamplingParams, token_odds
from tinyllm.inference.speculative import DRAFT_ROUNDS, PLAIN_TOKENS, Payoff, accept, speculate
from tinyllm.ops import cpu
from tinyllm.quantization.int8 import quantize_model

PROMPT = [5, 17, 42, 5, 17]


class Clock:
    """Time that only passes when asked: each reading is a second later, guesses always pay."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def drafts(model, sampling) -> dict:
    return {
        "lookup": LookupDraft(),
        "smaller": ModelDraft(tiny_model(seed=3, n_layers=1, d=16), sampling),
        "int8": ModelDraft(quantize_model(model), sampling),
        "layers": ModelDraft(first_layers(model, 1), sampling),
        "itself": ModelDraft(model, sampling),
    }


@pytest.mark.parametrize("name", ["lookup", "smaller", "int8", "layers", "itself"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_text_is_the_same(name, penalty):
    model = tiny_model(d=64, n_heads=2, n_kv_heads=1, d_head=32)
    greedy = SamplingParams(repetition_penalty=penalty, max_new_tokens=40)
    plain = list(generate(model, PROMPT, greedy, ()))
    draft = drafts(model, greedy)[name]
    fast = speculate(model, PROMPT, greedy, (), draft, n_draft=4, clock=Clock())
    assert list(fast) == plain
    assert fast.reason == "length"
    if name == "itself" and penalty == 1:
        assert fast.stats.acceptance == 1.0
        assert fast.stats.tokens_per_pass > 2
    if name == "int8":
        assert fast.stats.n_proposed > 10


INT8_DRAFTS = {
    "lookup": lambda model, sampling: LookupDraft(),
    "layers": lambda model, sampling: ModelDraft(first_layers(model, 1), sampling),
    "itself": ModelDraft,
}


@pytest.mark.parametrize("name", INT8_DRAFTS)
def test_an_int8_model_checks_guesses_with_the_bits_of_single_tokens(name):
    if cpu.load()[0] is None:
        pytest.skip("no native kernels here")
    model = quantize_model(tiny_model(d=64, n_heads=2, n_kv_heads=1, d_head=32))
    for prompt in ([5, 17, 42, 5, 17], [9] * 20, list(range(30))):
        greedy = SamplingParams(max_new_tokens=60)
        plain = list(generate(model, prompt, greedy, ()))
        draft = INT8_DRAFTS[name](model, greedy)
        fast = speculate(model, prompt, greedy, (), draft, n_draft=4, clock=Clock())
        assert list(fast) == plain
        assert fast.stats.n_proposed > 0


@pytest.mark.parametrize("n_draft", [1, 3, 50])
def test_it_ends_where_plain_text_ends(n_draft):
    model = tiny_model()
    endless = SamplingParams(max_new_tokens=1000)
    plain = generate(model, PROMPT, endless, ())
    expected = list(plain)
    fast = speculate(model, PROMPT, endless, (), LookupDraft(), n_draft=n_draft, clock=Clock())
    assert (list(fast), fast.reason) == (expected, "context")
    draft = ModelDraft(model, endless)
    fast = speculate(model, PROMPT, endless, (), draft, n_draft=n_draft, clock=Clock())
    assert (list(fast), fast.reason) == (expected, "context")
    stop = expected[11]
    fast = speculate(model, PROMPT, endless, {stop}, draft, n_draft=n_draft, clock=Clock())
    assert (list(fast), fast.reason) == (expected[: expected.index(stop)], "stop")


def chi_square(counts: Counter, odds: dict, n: int) -> tuple[float, int]:
    """Return the statistic and its degrees of freedom; cells that expect fewer than 5 are one."""
    big = {key: p * n for key, p in odds.items() if p * n >= 5}
    cells = [(counts[key], expected) for key, expected in big.items()]
    rest = n - sum(big.values())
    if rest > 1e-9:
        cells.append((n - sum(counts[key] for key in big), rest))
    return sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1


def limit(freedom: int) -> float:
    """The chi-square value exceeded once in 10,000 (Wilson & Hilferty 1931, z = 3.719)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("certain", [False, True])
def test_accepted_and_replaced_tokens_have_the_models_odds(certain):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(3, 5, generator=generator).softmax(-1)
    q = (3 * torch.rand(2, 5, generator=generator)).softmax(-1)
    n, counts = 5000, Counter()
    for _ in range(n):
        guesses = [2, 0] if certain else torch.multinomial(q, 1, generator=generator)[:, 0].tolist()
        taken = accept(p, guesses, None if certain else q, generator)
        while len(taken) < 3:  # what the next rounds would draw
            taken.append(int(torch.multinomial(p[len(taken)], 1, generator=generator)))
        counts[tuple(taken)] += 1
    odds = {
        (a, b, c): float(p[0, a] * p[1, b] * p[2, c])
        for a in range(5)
        for b in range(5)
        for c in range(5)
    }
    statistic, freedom = chi_square(counts, odds, n)
    assert freedom > 50
    assert statistic < limit(freedom)


def test_sampled_texts_have_the_models_odds(monkeypatch):
    """Real models with five tokens, a bad draft and every filter, 300 seeds."""
    monkeypatch.setattr(Payoff, "is_on", True)
    model = tiny_model(vocab_size=5, n_layers=1)
    small = tiny_model(seed=9, vocab_size=5, n_layers=1, d=16)
    prompt, n, counts, accepted = [1, 2, 3], 300, Counter(), 0
    settings = {"temperature": 1.3, "top_k": 4, "repetition_penalty": 1.2, "max_new_tokens": 3}
    for seed in range(n):
        sampling = SamplingParams(seed=seed, **settings)
        text = speculate(model, prompt, sampling, (), ModelDraft(small, sampling), n_draft=2)
        counts[tuple(text)[1:]] += 1  # the first token is the prompt's pass
        accepted += text.stats.n_accepted
    assert accepted > n / 10
    odds: Counter = Counter()
    texts = [(a, b, c) for a in range(5) for b in range(5) for c in range(5)]
    rows = torch.tensor([[*prompt, *text] for text in texts])
    with torch.inference_mode():
        logits = model(rows)[:, 2:5]
    for text, ids, logits_TV in zip(texts, rows, logits, strict=True):
        seen = torch.zeros(3, 5, dtype=torch.bool)
        for i in range(3):
            seen[i, ids[: 3 + i]] = True
        p = token_odds(logits_TV, seen, SamplingParams(**settings))
        odds[text[1:]] += float(p[range(3), text].prod())
    assert sum(odds.values()) == pytest.approx(1, abs=1e-4)
    statistic, freedom = chi_square(counts, odds, n)
    assert freedom >= 8
    assert statistic < limit(freedom)


def test_lookup_finds_what_followed_the_longest_tail():
    draft = LookupDraft()
    assert draft.propose([1, 2, 3, 4], 3) == ([], None)
    assert draft.propose([1, 2, 3, 4, 9, 2, 3], 2) == ([4, 9], None)
    assert draft.propose([1, 2, 3, 4, 9, 2, 3, 7, 2, 3], 3)[0] == [7, 2, 3]
    assert draft.propose([1, 2, 3, 4, 9, 2, 3, 7, 2, 3, 4, 1, 2, 3], 1)[0] == [4]


def drive(payoff: Payoff, plain_s: float, round_s: float, tokens: int, n: int) -> list[bool]:
    choices = []
    for _ in range(n):
        choices.append(payoff.is_on)
        if payoff.is_on:
            payoff.note(tokens, round_s, guessed=True)
        else:
            payoff.note(1, plain_s, guessed=False)
    return choices


def test_guesses_that_pay_go_on_and_others_pause_longer_and_longer():
    assert drive(Payoff(), 1.0, 2.0, 3, 60) == [False] * PLAIN_TOKENS + [True] * (60 - PLAIN_TOKENS)
    choices = drive(Payoff(), 1.0, 4.0, 3, 400)
    assert choices[:PLAIN_TOKENS] == [False] * PLAIN_TOKENS
    assert sum(choices) <= 6 * DRAFT_ROUNDS  # tried again, ever less often
    assert any(choices[60:])


def test_a_draft_that_hurts_is_switched_off_in_a_real_text():
    model = tiny_model(max_seq_len=400)

    class Slow(Clock):
        def propose(self, ids, n):
            self.now += 100
            return [0] * n, None

    slow = Slow()
    sampling = SamplingParams(max_new_tokens=300)
    text = speculate(model, PROMPT, sampling, (), slow, n_draft=2, clock=slow)
    assert list(text) == list(generate(model, PROMPT, sampling, ()))
    assert text.stats.n_rounds <= 6 * DRAFT_ROUNDS


def test_a_layer_skipped_model_shares_its_weights():
    model = tiny_model()
    draft = first_layers(model, 1)
    assert draft.layers[0] is model.layers[0]
    assert (len(draft.layers), len(model.layers)) == (1, 2)
    for n in (0, 2):
        with pytest.raises(DataError, match=f"draft: {n} layers of 2"):
            first_layers(model, n)
    with pytest.raises(DataError, match="0 layers of 1 make no cheaper model; choose another"):
        first_layers(draft, 0)
