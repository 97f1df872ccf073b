import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tinyllm.corpus.clean_params import CleanParams
from tinyllm.corpus.filters import QUALITY, REPETITION, judge, view
from tinyllm.corpus.language import LanguageFilter
from tinyllm.corpus.repetition import duplicate_word_runs, top_word_run
from tinyllm.corpus.runs import WordHasher
from tinyllm.params import build_params, read_yaml

ROOT = Path(__file__).parents[2]
PARAMS = build_params(CleanParams, read_yaml(ROOT / "params.yaml")["clean"], "p")
WORDS = "the fox and its friend have been to that wide field of yellow corn with a small river"


def prose(n_words, seed=0):
    """Words without repetition that matters: half of them are new each time."""
    rng = random.Random(seed)
    new = ("".join(rng.choices("aeioulmnrst", k=5)) for _ in range(n_words))
    return [word if i % 2 else rng.choice(WORDS.split()) for i, word in enumerate(new)]


def lines(words, n=8):
    return "\n".join(" ".join(words[i : i + n]) for i in range(0, len(words), n))


def reason(text, **changes):
    return judge(view(text, WordHasher()), replace(PARAMS, **changes), QUALITY + REPETITION)


GOOD = lines(prose(400))


def test_good_text_is_kept():
    assert reason(GOOD) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (lines(prose(49)), "short_doc"),
        (lines(["ab"] * 60), "below_avg_word_length"),
        (lines(["abcdefghijk"] * 60), "above_avg_word_length"),
        (GOOD + " #" * 60, "too_many_hashes"),
        (GOOD + " wait..." * 60, "too_many_ellipsis"),
        (GOOD + " wait…" * 60, "too_many_ellipsis"),
        ("\n".join("- " + line for line in GOOD.split("\n")), "too_many_bullets"),
        ("\n".join(line + "..." for line in lines(prose(400), 20).split("\n")),
         "too_many_end_ellipsis"),
        (GOOD + " 1234" * 150, "below_alpha_threshold"),
        (lines(prose(400)[1::2]), "not_enough_stop_words"),
        (GOOD + "\nEXIT ALL" * 80, "dup_line_frac"),
        (GOOD + f"\n{' '.join(prose(30, 5))}" * 6, "dup_line_char_frac"),
        (GOOD + "\n\none\n\ntwo" * 3, "dup_para_frac"),
        (GOOD + f"\n\n{lines(prose(70, 5))}" * 3, "dup_line_char_frac"),
        (GOOD + " nevermore quoth" * 60, "top_2_gram"),
        (GOOD + "".join(f" one fine day {w}" for w in prose(60, 9)), "top_3_gram"),
        (GOOD + " " + " ".join(prose(150, 5)) * 2, "duplicated_5_n_grams"),
        (GOOD + " " + " ".join(prose(80, 5)) * 2, "duplicated_9_n_grams"),  # 0.11, but not 0.15
    ],
)  # fmt: skip
def test_each_fault_has_its_reason(text, expected):
    assert reason(text) == expected


def test_repeated_paragraphs_count_in_characters_too():
    text = "\n\n".join([GOOD, *[lines(prose(70, 5))] * 3])
    loose = {"dup_line_frac": 1.0, "dup_line_char_frac": 1.0, "dup_para_frac": 1.0}
    assert reason(text, **loose) == "dup_para_char_frac"


def test_too_long_and_language_without_stop_words():
    assert reason(GOOD, max_doc_words=399) == "long_doc"
    assert reason(lines(prose(400)[1::2]), min_stop_words=0) is None


def test_empty_text_breaks_nothing():
    assert reason("") == "short_doc"
    assert reason("", min_doc_words=0, min_stop_words=0) is None


def slow_top(words, n):
    """Gopher's definition with tuples."""
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    if not counts or counts.most_common(1)[0][1] == 1:
        return 0
    run, count = counts.most_common(1)[0]
    return count * len(" ".join(run))


def slow_duplicates(words, n):
    seen, covered = set(), set()
    for i in range(len(words) - n + 1):
        run = tuple(words[i : i + n])
        if run in seen:
            covered.update(range(i, i + n))
        seen.add(run)
    return sum(len(words[i]) for i in covered)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 10])
@pytest.mark.parametrize("n_words", [0, 1, 4, 5, 30, 500])
def test_runs_of_words_equal_their_slow_twins(n, n_words):
    for seed, alphabet in enumerate(("ab", "abcdef", "abcdefghijklmnop")):
        rng = random.Random(seed)
        words = [letter * (1 + ord(letter) % 3) for letter in rng.choices(alphabet, k=n_words)]
        hashes, lengths = WordHasher()(words), np.array([len(word) for word in words], np.int64)
        assert top_word_run(hashes, lengths, n) == slow_top(words, n)
        assert duplicate_word_runs(hashes, lengths, n) == slow_duplicates(words, n)


def test_language_is_told_from_the_middle_of_the_text():
    english = LanguageFilter(["en"], 0.5)
    text = "It was a bright cold day in April and all the clocks of the town were striking. " * 9
    german = "Es war ein heller, kalter Tag im April, und die Uhren der Stadt schlugen alle. " * 9
    assert english(text) is None
    assert english(german) == "language"
    assert LanguageFilter(["en", "de"], 0.5)(german) is None
    assert english(german * 4 + "\n" + text * 9) is None
    assert LanguageFilter([], 0.5)(german) is None
