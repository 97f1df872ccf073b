"""How much of a text comes again: repeated lines, paragraphs and runs of words.

Words are hashed once and runs are compared as numbers, so that a play of 25,000 words takes
milliseconds. Definitions: Gopher (Rae et al. 2021, arXiv:2112.11446, A.1.1, repetition removal).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tinyllm.corpus.runs import Hashes, hash_runs

Ints = NDArray[np.int64]


def duplicate_parts(parts: Sequence[str]) -> tuple[int, int]:
    """Return how many parts equal an earlier one, and the characters in those.

    >>> duplicate_parts(["a", "bc", "a", "a"])
    (2, 2)
    """
    seen: set[str] = set()
    n_repeats = n_chars = 0
    for part in parts:
        if part in seen:
            n_repeats += 1
            n_chars += len(part)
        else:
            seen.add(part)
    return n_repeats, n_chars


def top_word_run(hashes: Hashes, lengths: Ints, n: int) -> int:
    """Return the characters in all occurrences of the commonest run of `n` words, 0 if all differ.

    Args:
        hashes: of the words, (W,).
        lengths: of the words in characters, (W,).
        n: words in a run.
    """
    _, first, counts = np.unique(hash_runs(hashes, n), return_index=True, return_counts=True)
    if not len(counts) or (top := int(counts.max())) == 1:
        return 0
    start = int(first[counts == top].min())  # of several commonest runs the one that came first
    return top * (int(lengths[start : start + n].sum()) + n - 1)


def duplicate_word_runs(hashes: Hashes, lengths: Ints, n: int) -> int:
    """Return the characters of words in runs of `n` words that were there before, each once.

    It never grows with `n`: whoever repeats ten words in a row repeats five.
    """
    runs = hash_runs(hashes, n)
    again = np.ones(len(runs), np.bool_)
    again[np.unique(runs, return_index=True)[1]] = False
    covered = np.zeros(len(hashes), np.bool_)
    for shift in range(n if len(runs) else 0):
        covered[shift : shift + len(runs)] |= again
    return int(lengths[covered].sum())
