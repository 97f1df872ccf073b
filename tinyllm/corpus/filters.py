"""Quality filters: each is a small pure function that returns None (keep) or the reason to drop.

Rules and names follow Gopher (Rae et al. 2021, arXiv:2112.11446, A.1.1) as datatrove spells them.
C4's rule that a line must end with punctuation is left out: it would delete verse.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tinyllm.corpus.clean_params import CleanParams
from tinyllm.corpus.repetition import (
    duplicate_parts,
    duplicate_word_runs,
    top_word_run,
)
from tinyllm.corpus.runs import Hashes, WordHasher

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
"""Gopher's eight: English text has at least two of them."""

_LETTER = re.compile(r"[^\W\d_]")
_BULLET = re.compile(r"[ \t]*[•‣▶◦▪●*-](?: |\t|$)")
_ELLIPSIS = ("...", "…")
_PARAGRAPHS = re.compile(r"\n{2,}")


@dataclass(frozen=True, slots=True)
class View:
    """A text with the parts that filters look at, taken once."""

    text: str
    words: list[str]
    """Between white space."""
    counts: Counter[str]
    """Of the words."""
    lines: list[str]
    """Stripped, without the empty ones."""
    hashes: Hashes
    """Of the words, (W,)."""


Filter = Callable[[View, CleanParams], str | None]


def view(text: str, hasher: WordHasher) -> View:
    """Return the view of a text."""
    words = text.split()
    lines = [line for raw in text.split("\n") if (line := raw.strip())]
    return View(text, words, Counter(words), lines, hasher(words))


def judge(seen: View, params: CleanParams, filters: tuple[Filter, ...]) -> str | None:
    """Return the first reason to drop a document, or None."""
    for reject in filters:
        if (reason := reject(seen, params)) is not None:
            return reason
    return None


def length(seen: View, params: CleanParams) -> str | None:
    """Too few or too many words."""
    if len(seen.words) < params.min_doc_words:
        return "short_doc"
    return "long_doc" if len(seen.words) > params.max_doc_words else None


def word_length(seen: View, params: CleanParams) -> str | None:
    """Words that are too short or too long on average: tables, addresses, code."""
    if not seen.words:
        return None
    mean = sum(map(len, seen.words)) / len(seen.words)
    if mean < params.min_avg_word_length:
        return "below_avg_word_length"
    return "above_avg_word_length" if mean > params.max_avg_word_length else None


def symbols(seen: View, params: CleanParams) -> str | None:
    """Too many hashes or ellipses: tags, teasers."""
    most = params.max_symbol_word_ratio * len(seen.words)
    if seen.text.count("#") > most:
        return "too_many_hashes"
    return "too_many_ellipsis" if sum(map(seen.text.count, _ELLIPSIS)) > most else None


def line_ends(seen: View, params: CleanParams) -> str | None:
    """Too many bullet lines or lines that break off: lists, previews."""
    n_bullets = sum(_BULLET.match(line) is not None for line in seen.lines)
    if n_bullets > params.max_bullet_lines_ratio * len(seen.lines):
        return "too_many_bullets"
    n_ellipses = sum(line.endswith(_ELLIPSIS) for line in seen.lines)
    if n_ellipses > params.max_ellipsis_lines_ratio * len(seen.lines):
        return "too_many_end_ellipsis"
    return None


def alphabetic(seen: View, params: CleanParams) -> str | None:
    """Too many words without a letter: numbers, ruled lines."""
    n_alpha = sum(count for word, count in seen.counts.items() if _LETTER.search(word))
    few = n_alpha < params.min_alpha_words_ratio * len(seen.words)
    return "below_alpha_threshold" if few else None


def stop_words(seen: View, params: CleanParams) -> str | None:
    """Too few of the commonest words: lists of names, tags."""
    if params.min_stop_words == 0:
        return None
    found = {word.lower().strip(".,;:!?\"'()") for word in seen.counts} & STOP_WORDS
    return "not_enough_stop_words" if len(found) < params.min_stop_words else None


def repeated_lines(seen: View, params: CleanParams) -> str | None:
    """Too many lines or paragraphs that were there before."""
    n_repeats, n_chars = duplicate_parts(seen.lines)
    if n_repeats > params.dup_line_frac * len(seen.lines):
        return "dup_line_frac"
    if n_chars > params.dup_line_char_frac * len(seen.text):
        return "dup_line_char_frac"
    paragraphs = _PARAGRAPHS.split(seen.text)
    n_repeats, n_chars = duplicate_parts(paragraphs)
    if n_repeats > params.dup_para_frac * len(paragraphs):
        return "dup_para_frac"
    return "dup_para_char_frac" if n_chars > params.dup_para_char_frac * len(seen.text) else None


def repeated_words(seen: View, params: CleanParams) -> str | None:
    """Too many words in runs that come again: generated or copied text."""
    lengths = np.fromiter(map(len, seen.words), np.int64, len(seen.words))
    for n, share in params.top_n_grams.items():
        if top_word_run(seen.hashes, lengths, int(n)) > share * len(seen.text):
            return f"top_{n}_gram"
    strictest = min(params.dup_n_grams.values(), default=1.0) * len(seen.text)
    for n, share in sorted(params.dup_n_grams.items(), key=lambda item: int(item[0])):
        n_chars = duplicate_word_runs(seen.hashes, lengths, int(n))
        if n_chars > share * len(seen.text):
            return f"duplicated_{n}_n_grams"
        if n_chars <= strictest:  # longer runs repeat less: they all pass
            return None
    return None


QUALITY: tuple[Filter, ...] = (length, word_length, symbols, line_ends, alphabetic, stop_words)
"""In order; cheap ones first."""
REPETITION: tuple[Filter, ...] = (repeated_lines, repeated_words)
