"""A document as a set of hashed 5-word shingles, and such a set as a short MinHash signature.

Words are compared in lower case without punctuation, so that layout and spelling of marks do not
hide a copy.
"""

import re

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from tinyllm.corpus.runs import Hashes, WordHasher, hash_runs

Signature = NDArray[np.uint32]

SHINGLE_WORDS = 5
N_PERMUTATIONS = 128
"""Length of a signature: the standard error of a similarity of 0.8 is 0.035."""
_SEED = 1
_WORD = re.compile(r"\w+")


def shingle(text: str, hasher: WordHasher) -> Hashes:
    """Return the hashes of the text's different shingles, sorted, (N,); a short text is one."""
    hashes = hasher(_WORD.findall(text.lower()))
    return np.unique(hash_runs(hashes, min(SHINGLE_WORDS, max(1, len(hashes)))))


def signature(shingles: Hashes) -> Signature:
    """Return the MinHash signature of a set of shingles, (N_PERMUTATIONS,)."""
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        shingles, [0, len(shingles)], N_PERMUTATIONS, _SEED
    )
    return np.array(matrix.to_rows()[0], np.uint32)
