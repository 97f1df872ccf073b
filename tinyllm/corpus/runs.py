"""Runs of words as 64-bit hashes, for counting repeats and comparing documents.

Two different runs share a hash with probability 2^-64; among the 10^7 runs of a large corpus that
is one chance in 10^5.
"""

import numpy as np
import xxhash
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class WordHasher:
    """Hashes words; remembers those it has seen, most of which come again."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, words: list[str]) -> Hashes:
        """Return the hash of each word, (W,)."""
        known = self._known
        for word in set(words).difference(known):
            known[word] = xxhash.xxh3_64_intdigest(word.encode())
        return np.fromiter(map(known.__getitem__, words), np.uint64, len(words))


def hash_runs(hashes: Hashes, n: int) -> Hashes:
    """Return a hash for each `n` words in a row.

    Args:
        hashes: (W,), one for each word.
        n: words in a run.

    Returns:
        (W - n + 1,), empty if there are fewer words.
    """
    n_runs = max(0, len(hashes) - n + 1)
    runs = np.zeros(n_runs, np.uint64)
    for shift in range(n):  # order matters: each step mixes before the next word is added
        runs = _mix(runs + hashes[shift : shift + n_runs])
    return runs


def _mix(values: Hashes) -> Hashes:
    """Return the values with their bits spread, as SplitMix64 ends (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))
