"""Byte-level BPE in plain Python, to be read: a trainer, an encoder, a decoder.

Start with a token per byte. Again and again, take the two neighbours that stand together most
often and make them one new token (Sennrich et al. 2016, arXiv:1508.07909, section 3.2, on bytes
as in GPT-2). Encoding replays the merges in the order in which they were learned. Pre-tokens
(`split.py`) are never crossed.

The pipeline uses the `tokenizers` library (`train.py`), 10 to 100 times faster; a test holds it
to the same merges and the same ids as this file.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

from tinyllm.tokenizer.alphabet import BYTE_ORDER, N_RESERVED
from tinyllm.tokenizer.special import SPECIAL_TOKENS
from tinyllm.tokenizer.split import split

Pair = tuple[int, int]

_ID_OF_BYTE = {byte: len(SPECIAL_TOKENS) + i for i, byte in enumerate(BYTE_ORDER)}


class Bpe:
    """A vocabulary: special tokens, the bytes, then one token per merge."""

    def __init__(self, merges: Iterable[Pair]) -> None:
        """Build the vocabulary.

        Args:
            merges: pairs of ids in the order in which they were learned.
        """
        self.merges: list[Pair] = []
        self._bytes = {i: bytes([byte]) for byte, i in _ID_OF_BYTE.items()}
        self._id_of = {raw: i for i, raw in self._bytes.items()}
        self._merged: dict[Pair, tuple[int, int]] = {}  # pair -> (when learned, new token)
        for pair in merges:
            self._add(pair)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, min_count: int = 1) -> "Bpe":
        """Learn merges from texts.

        Of two pairs that are equally frequent the one with the smaller ids comes first, so the
        result does not depend on the order of the texts.

        Args:
            texts: what to learn from.
            vocab_size: stop at this many tokens, or earlier when no pair is left.
            min_count: a pair must stand in the texts this often.
        """
        bpe, words = cls([]), Counter(word for text in texts for word in split(text))
        counts = list(words.values())
        spelled = [[_ID_OF_BYTE[byte] for byte in word.encode("utf-8")] for word in words]
        pair_counts: Counter[Pair] = Counter()
        where: defaultdict[Pair, set[int]] = defaultdict(set)  # pair -> words that may have it
        for i, ids in enumerate(spelled):
            for pair in pairwise(ids):
                pair_counts[pair] += counts[i]
                where[pair].add(i)
        while bpe.vocab_size < vocab_size and pair_counts:
            pair = max(pair_counts, key=lambda pair: (pair_counts[pair], -pair[0], -pair[1]))
            if pair_counts[pair] < min_count:
                break
            new = bpe._add(pair)
            for i in where.pop(pair):  # every other word keeps its pairs
                for old in pairwise(spelled[i]):
                    pair_counts[old] -= counts[i]
                spelled[i] = merge(spelled[i], pair, new)
                for fresh in pairwise(spelled[i]):
                    pair_counts[fresh] += counts[i]
                    where[fresh].add(i)
            del pair_counts[pair]
        return bpe

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return N_RESERVED + len(self._id_of) - len(BYTE_ORDER)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; the names of special tokens are text like any other."""
        return [i for word in split(text) for i in self._encode_word(word.encode("utf-8"))]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self._bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def _add(self, pair: Pair) -> int:
        """Append a merge and return its token; two merges may spell the same token."""
        raw = self._bytes[pair[0]] + self._bytes[pair[1]]
        new = self._id_of.setdefault(raw, self.vocab_size)
        self._bytes[new] = raw
        self._merged[pair] = (len(self.merges), new)
        self.merges.append(pair)
        return new

    def _encode_word(self, raw: bytes) -> Iterator[int]:
        """Apply the earliest learned merge that fits, leftmost first, until none fits."""
        ids = [_ID_OF_BYTE[byte] for byte in raw]
        while candidates := [
            (*self._merged[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in self._merged
        ]:
            _, new, i = min(candidates, key=lambda found: (found[0], found[2]))
            ids[i : i + 2] = [new]
        yield from ids


def merge(ids: list[int], pair: Pair, new: int) -> list[int]:
    """Replace every occurrence of a pair, from the left.

    >>> merge([1, 1, 1, 2], (1, 1), 9)
    [9, 1, 2]
    """
    result, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            result.append(new)
            i += 2
        else:
            result.append(ids[i])
            i += 1
    return result
