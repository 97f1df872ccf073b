"""Tokens in a row: the documents of a split one after the other, shard by shard."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint16] | NDArray[np.uint32]


class TokenStream:
    """The tokens of a split without their document borders; each document ends with <|endoftext|>.

    The arrays may be memory maps: nothing is read until it is asked for.
    """

    def __init__(self, shards: Sequence[Tokens], name: str = "tokens") -> None:
        """Join shards.

        Args:
            shards: the tokens of each shard, (n_tokens,).
            name: what messages call the stream.
        """
        self.shards, self.name = tuple(shards), name
        self._ends = np.cumsum([len(shard) for shard in self.shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.shards else 0

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return tokens `start` to `stop` (exclusive) of the whole stream, across shards.

        A `stop` beyond the end gives what there is.
        """
        first = int(np.searchsorted(self._ends, start, side="right"))
        parts, at = [], int(self._ends[first - 1]) if first else 0
        for shard in self.shards[first:]:
            if at >= stop:
                break
            parts.append(shard[max(start - at, 0) : stop - at].astype(np.int64))
            at += len(shard)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)
