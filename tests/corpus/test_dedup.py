import random

import numpy as np
import pytest

from tinyllm.corpus.dedup import HeldOut, near_duplicates, stack_signatures
from tinyllm.corpus.runs import WordHasher
from tinyllm.corpus.shingles import N_PERMUTATIONS, shingle, signature

RNG = random.Random(1)
VOCABULARY = ["".join(RNG.choices("abcdefghij", k=6)) for _ in range(5000)]


def text(seed, n=400):
    return random.Random(seed).choices(VOCABULARY, k=n)


def sets_of(texts):
    hasher = WordHasher()
    return [shingle(" ".join(words), hasher) for words in texts]


def flags(texts, threshold=0.8):
    return near_duplicates(
        stack_signatures([signature(each) for each in sets_of(texts)]), threshold
    ).tolist()


def jaccard(a, b):
    """The definition, on sets of word tuples."""
    a, b = ({tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (a, b))
    return len(a & b) / len(a | b)


def edited(words, n_changes, seed=3):
    """Replace words far enough from each other that each change costs five shingles."""
    words = list(words)
    for i in range(n_changes):
        words[5 + i * (len(words) - 10) // n_changes] = f"new{seed}x{i}"
    return words


def test_shingles_equal_sets_of_tuples():
    a, b = text(1), edited(text(1), 10)
    x, y = sets_of([a, b])
    shared = len(np.intersect1d(x, y))
    assert shared / (len(x) + len(y) - shared) == jaccard(a, b)


def test_signatures_estimate_the_similarity():
    for n_changes in (4, 10, 25):
        a, b = text(1, 2000), edited(text(1, 2000), n_changes * 5)
        x, y = map(signature, sets_of([a, b]))
        true = jaccard(a, b)
        assert abs((x == y).mean() - true) < 4 * (true * (1 - true) / N_PERMUTATIONS) ** 0.5


def test_case_punctuation_and_layout_do_not_hide_a_copy():
    words = text(1)
    loud = "\n".join(f"{word.upper()}!" for word in words)
    a, b = sets_of([words, [loud]])
    assert (a == b).all()


@pytest.mark.parametrize("words", [[], ["one"], ["one", "two", "three"]])
def test_texts_shorter_than_a_shingle_are_one(words):
    [shingles] = sets_of([words])
    assert len(shingles) == min(1, len(words))
    assert signature(shingles).shape == (N_PERMUTATIONS,)


def test_near_duplicates_are_found_and_others_are_not():
    near, far = edited(text(1), 6), edited(text(1), 30)
    assert jaccard(text(1), near) > 0.85
    assert jaccard(text(1), far) < 0.55
    texts = [text(1), text(2), near, far, text(1), text(2)[:-1]]
    assert flags(texts) == [False, False, True, False, True, True]


def test_recall_and_precision_over_many_pairs():
    originals = [text(seed, 300) for seed in range(60)]
    copies = [edited(words, 4, seed) for seed, words in enumerate(originals)]  # about 0.87
    assert flags(originals + copies)[:60] == [False] * 60
    assert sum(flags(originals + copies)[60:]) >= 57
    cousins = [edited(words, 20, seed) for seed, words in enumerate(originals)]  # about 0.5
    assert sum(flags(originals + cousins)) == 0


def test_no_and_one_document():
    assert flags([]) == []
    assert flags([text(1)]) == [False]


def test_overlap_finds_copies_excerpts_and_collections():
    played, other, third = text(1), text(2), text(3)
    held_out = HeldOut(sets_of([played, third]))
    excerpt, collection, edition = played[100:200], other + played + text(4), edited(played, 6)
    got = [held_out.overlap(each) for each in sets_of([excerpt, collection, edition, other])]
    assert got[0] == 1
    assert got[1] == 1
    assert 0.9 < got[2] < 1
    assert got[3] == 0


def test_overlap_equals_the_definition_on_sets():
    rng = random.Random(0)
    sets = [np.unique(np.array(rng.choices(range(200), k=60), np.uint64)) for _ in range(20)]
    held_out = HeldOut(sets[:8])
    for probe in sets[8:]:
        expected = max(
            len(set(probe) & set(each)) / min(len(probe), len(each)) for each in sets[:8]
        )
        assert held_out.overlap(probe) == pytest.approx(expected)
    assert HeldOut([]).overlap(sets[0]) == 0
