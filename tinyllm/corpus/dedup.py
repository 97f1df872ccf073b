"""Near-duplicates among many documents (MinHash with banding), and copies of held-out text (exact).

Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.3-3.4: documents whose signatures agree
in one band of rows are compared; the rest is never looked at.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tinyllm.corpus.runs import Hashes
from tinyllm.corpus.shingles import N_PERMUTATIONS, Signature

RECALL = 0.99
"""Least share of pairs at the threshold that meet in a band."""


def near_duplicates(signatures: NDArray[np.uint32], threshold: float) -> NDArray[np.bool_]:
    """Return for each document whether an earlier one is similar to it.

    Args:
        signatures: (N, N_PERMUTATIONS).
        threshold: Jaccard similarity, estimated from the signatures.

    Returns:
        (N,); the first of a group of similar documents is False.
    """
    later, earlier = _candidates(signatures, _rows_per_band(threshold))
    flags = np.zeros(len(signatures), np.bool_)
    for start in range(0, len(later), 1 << 16):  # in parts: 64 MB at a time
        a, b = later[start : start + (1 << 16)], earlier[start : start + (1 << 16)]
        similarity = (signatures[a] == signatures[b]).mean(axis=1)
        flags[a[similarity >= threshold]] = True
    return flags


class HeldOut:
    """The shingles of the validation documents, to find copies of them."""

    def __init__(self, shingle_sets: Sequence[Hashes]) -> None:
        """Take the shingles of each validation document."""
        self._sizes = np.array([len(shingles) for shingles in shingle_sets], np.int64)
        hashes = np.concatenate([np.empty(0, np.uint64), *shingle_sets])
        owners = np.repeat(np.arange(len(shingle_sets)), self._sizes)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._owners = hashes[order], owners[order]

    def overlap(self, shingles: Hashes) -> float:
        """Return the largest share of the smaller set in common with one held-out document.

        Of the smaller set, not of both: an excerpt of a held-out play and a collection that
        contains it are leaks too, though their Jaccard similarity is small.
        """
        left = np.searchsorted(self._hashes, shingles, "left")
        counts = np.searchsorted(self._hashes, shingles, "right") - left
        if not counts.any():
            return 0.0
        left, counts = left[counts > 0], counts[counts > 0]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        owners = self._owners[np.repeat(left, counts) + within]
        shared = np.bincount(owners, minlength=len(self._sizes))
        smaller = np.minimum(self._sizes, len(shingles))
        return float((shared / np.maximum(smaller, 1)).max())


def stack_signatures(signatures: Sequence[Signature]) -> NDArray[np.uint32]:
    """Return signatures as one matrix, (N, N_PERMUTATIONS), also when there are none."""
    return np.array(signatures, np.uint32).reshape(-1, N_PERMUTATIONS)


def _rows_per_band(threshold: float) -> int:
    """Return the most rows per band with which pairs at the threshold are found with `RECALL`.

    >>> _rows_per_band(0.8)
    4
    """
    for rows in (32, 16, 8, 4, 2):
        if 1 - (1 - threshold**rows) ** (N_PERMUTATIONS // rows) >= RECALL:
            return rows
    return 1


def _candidates(
    signatures: NDArray[np.uint32], rows: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return pairs (later, earlier) that agree in a band.

    Each is paired with the first of its group and with the one before: enough to find all but the
    first of a group, and linear in its size.
    """
    pairs = [np.empty((0, 2), np.int64)]
    for start in range(0, N_PERMUTATIONS, rows):
        band = np.ascontiguousarray(signatures[:, start : start + rows])
        keys = band.view(np.dtype((np.void, band.itemsize * rows))).ravel()
        groups = np.unique(keys, return_inverse=True)[1]
        order = np.argsort(groups, kind="stable")
        sorted_groups = groups[order]
        same = np.flatnonzero(sorted_groups[1:] == sorted_groups[:-1]) + 1
        starts = np.flatnonzero(np.r_[True, sorted_groups[1:] != sorted_groups[:-1]])
        first = order[starts[np.searchsorted(starts, same, "right") - 1]] if len(same) else same
        pairs += [np.stack([order[same], first], 1), np.stack([order[same], order[same - 1]], 1)]
    unique = np.unique(np.concatenate(pairs), axis=0)
    return unique[:, 0], unique[:, 1]
