import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_text import made_up_text, real_text, tiny_tokenizer

from tinyllm.errors import GateError
from tinyllm.tokenizer.alphabet import N_RESERVED
from tinyllm.tokenizer.prune import (
    PruneParams,
    PruneReport,
    check,
    count_tokens,
    leaf_prune,
    prune,
    require_clean,
)
from tinyllm.tokenizer.special import SPECIAL_TOKENS
from tinyllm.tokenizer.tokenizer import Tokenizer
from tinyllm.tokenizer.train import TokenizerParams, train_bpe

CLEAN = PruneReport(0, 0, 0)


@pytest.fixture(scope="module")
def full():
    params = TokenizerParams(vocab_size=1500, min_count=2, sample_bytes=10**9)
    return Tokenizer(train_bpe([real_text(200_000), made_up_text(4000)], params))


def document_of(tokenizer: Tokenizer) -> str:
    return tokenizer.backend.to_str()


def test_leaf_prune_by_hand():
    """abc goes first and its use counts for ab; then ab counts less than cd, and c and d stay."""
    ids = {"a": 0, "b": 1, "c": 2, "d": 3, "ab": 4, "cd": 5, "abc": 6}
    merges = [("a", "b"), ("c", "d"), ("ab", "c")]
    counts = {6: 1, 4: 2, 5: 4}
    assert leaf_prune(ids, merges, counts, 6) == set("abcd") | {"ab", "cd"}
    assert leaf_prune(ids, merges, counts, 5) == set("abcd") | {"cd"}
    assert leaf_prune(ids, merges, counts, 2) == set("abcd")
    # with abc's count flowing down, ab outlives cd
    assert leaf_prune(ids, merges, {6: 3, 4: 2, 5: 4}, 5) == set("abcd") | {"ab"}


def test_a_token_with_two_merges_keeps_both_or_goes():
    ids = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    assert leaf_prune(ids, merges, {5: 9}, 5) == {"a", "b", "c", "ab", "bc"}
    assert leaf_prune(ids, merges, {5: 9}, 6) == set(ids)
    assert leaf_prune(ids, merges, {5: 9}, 4) == {"a", "b", "c", "ab"}


@pytest.mark.parametrize("vocab_size", [N_RESERVED, 300, 700, 1499, 1500, 9999])
def test_pruning_changes_nothing_else(full, vocab_size):
    counts = count_tokens(full, [real_text(200_000)])
    pruned = Tokenizer(prune(document_of(full), counts, vocab_size))
    assert pruned.vocab_size == min(vocab_size, full.vocab_size)
    held_out = real_text(260_000)[200_000:]
    assert check(full, pruned, [held_out, made_up_text(500, seed=3), "\x00é😀"]) == CLEAN
    document, before = json.loads(document_of(pruned)), json.loads(document_of(full))
    vocabulary, old = document["model"]["vocab"], before["model"]["vocab"]
    assert sorted(vocabulary, key=vocabulary.get) == [
        token for token in sorted(old, key=old.get) if token in vocabulary
    ]
    assert list(vocabulary)[: len(SPECIAL_TOKENS)] == list(SPECIAL_TOKENS)
    for left, right in document["model"]["merges"]:
        assert {left, right, left + right} <= vocabulary.keys()
    built = {left + right for left, right in document["model"]["merges"]}
    assert len(vocabulary) == N_RESERVED + len(built)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text("ab -", min_size=5, max_size=60), min_size=1, max_size=4),
    st.integers(N_RESERVED, 300),
    st.randoms(),
)
def test_any_counts_give_a_clean_vocabulary(texts, vocab_size, rng):
    params = TokenizerParams(vocab_size=320, min_count=1, sample_bytes=10**9)
    full = Tokenizer(train_bpe(texts, params))
    counts = Counter({i: rng.randint(0, 9) for i in range(full.vocab_size)})
    pruned = Tokenizer(prune(document_of(full), counts, vocab_size))
    assert pruned.vocab_size <= max(vocab_size, N_RESERVED)
    assert check(full, pruned, [*texts, "".join(texts)]) == CLEAN


def test_leaf_pruning_beats_the_first_merges(full):
    """Tokens of the counted text are kept, not just those learned early."""
    text = made_up_text(2000, seed=0)
    pruned = Tokenizer(prune(document_of(full), count_tokens(full, [text]), 500))
    document = json.loads(document_of(full))
    document["model"]["merges"] = document["model"]["merges"][: 500 - N_RESERVED]
    vocabulary = document["model"]["vocab"]
    document["model"]["vocab"] = {token: i for token, i in vocabulary.items() if i < 500}
    first = Tokenizer(json.dumps(document))
    assert first.vocab_size == pruned.vocab_size == 500
    assert len(pruned.encode(text)) < 0.97 * len(first.encode(text))


def usual_script(document: str, counts: Counter[int], vocab_size: int) -> str:
    """Keep the most frequent tokens, drop merges that lost a part: what must not be done."""
    content = json.loads(document)
    old = content["model"]["vocab"]
    rank = sorted(old, key=lambda token: (old[token] >= N_RESERVED, -counts[old[token]]))
    kept = set(rank[:vocab_size])
    content["model"]["vocab"] = {
        token: i for i, token in enumerate(sorted(kept, key=old.__getitem__))
    }
    content["model"]["merges"] = [
        pair for pair in content["model"]["merges"] if {*pair, "".join(pair)} <= kept
    ]
    return json.dumps(content)


def test_check_finds_what_the_usual_script_breaks(full):
    counts = count_tokens(full, [real_text(200_000)])
    report = check(
        full, Tokenizer(usual_script(document_of(full), counts, 700)), [real_text(100_000)]
    )
    assert report.unreachable_tokens > 10
    assert report.changed_words > 10
    assert report.round_trip_failures == 0
    with pytest.raises(GateError, match="unreachable"):
        require_clean(report)


def test_check_counts_round_trip_failures(full):
    other = tiny_tokenizer()
    document = json.loads(document_of(other))
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    document["normalizer"] = {"type": "Lowercase"}
    broken = Tokenizer(json.dumps(document))
    assert check(other, broken, ["A", "x"]).round_trip_failures == 1


@pytest.mark.parametrize("vocab_size", [0, 261])
def test_too_small_a_vocabulary_is_refused(vocab_size):
    with pytest.raises(ValueError, match="vocab_size: .* has no room"):
        PruneParams(vocab_size=vocab_size, sample_bytes=1)


def test_sizes_that_are_allowed():
    assert PruneParams(vocab_size=None, sample_bytes=1).vocab_size is None
    assert PruneParams(vocab_size=262, sample_bytes=1).vocab_size == 262
    with pytest.raises(ValueError, match="sample_bytes"):
        PruneParams(vocab_size=None, sample_bytes=0)
