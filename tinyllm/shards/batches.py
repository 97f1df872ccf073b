"""Which tokens are in which batch: a pure function of (seed, index).

Any batch can be asked for directly, so a resumed run needs no reader's state, and the same seed
gives the same batches whatever happened in between.

    B  sequences in a batch    T  tokens in a sequence
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tinyllm.errors import DataError
from tinyllm.shards.stream import TokenStream

IGNORED = -100
"""A target that is no part of the loss."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one micro-batch feeds to the model; arrays are C-contiguous."""

    ids: NDArray[np.int64]
    """(B, T) inputs."""
    targets: NDArray[np.int64]
    """(B, T) the token that follows each input, or `IGNORED`."""
    document_ids: NDArray[np.int64] | None
    """(B, T) equal numbers may attend to each other; None: the whole sequence may."""


class Batches(Protocol):
    """A source of micro-batches without an end."""

    def batch(self, index: int) -> Batch:
        """Return micro-batch `index`, counted from 0; always the same for the same index."""


class StreamBatches:
    """Windows of a token stream in a new random order each epoch.

    An epoch cuts every shard, from an offset of its own, into windows that share no target, and
    visits each once. Later epochs have other offsets, so a token meets new contexts. What does not
    fill a window at the two ends of a shard waits for another epoch.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        batch_size: int,
        seed: int,
        end_of_text: int | None = None,
    ) -> None:
        """Prepare.

        Args:
            stream: the tokens, by shard; no window crosses a shard's end.
            seq_len: T, inputs in a window; a window holds one token more.
            batch_size: B.
            seed: of the offsets and orders.
            end_of_text: the token that ends every document: documents do not see each other; None:
                they do.

        Raises:
            DataError: no shard holds a window.
        """
        self._stream, self._seed, self._end_of_text = stream, seed, end_of_text
        self._seq_len, self._batch_size = seq_len, batch_size
        self._lengths = np.array([len(shard) for shard in stream.shards], dtype=np.int64)
        self._longest = int(self._lengths.max(initial=0))
        if self._longest <= seq_len:
            raise DataError(
                f"{stream.name}: a sequence of {seq_len} tokens needs {seq_len + 1} in a row,"
                f" the longest shard has {self._longest}; lower seq_len or add text"
            )
        self._first_window = [0]  # of each epoch met so far, counted from the start of training
        self._epoch: _Epoch | None = None

    def batch(self, index: int) -> Batch:
        """Return micro-batch `index`."""
        windows = np.empty((self._batch_size, self._seq_len + 1), dtype=np.int64)
        for row, window in enumerate(windows):
            shard, start = self._locate(index * self._batch_size + row)
            window[:] = self._stream.shards[shard][start : start + len(window)]
        ids, targets = windows[:, :-1].copy(), windows[:, 1:].copy()
        documents = None if self._end_of_text is None else document_ids(ids, self._end_of_text)
        return Batch(ids=ids, targets=targets, document_ids=documents)

    def windows_in_epoch(self, epoch: int) -> int:
        """Return how many windows an epoch has; it varies by one per shard with the offset."""
        return int(self._windows_per_shard(self._offset(epoch)).sum())

    def _locate(self, window: int) -> tuple[int, int]:
        """Return shard and first token of a window, counted from the start of training."""
        while self._first_window[-1] <= window:
            epoch = len(self._first_window) - 1
            self._first_window.append(self._first_window[-1] + self.windows_in_epoch(epoch))
        epoch = bisect_right(self._first_window, window) - 1
        if self._epoch is None or self._epoch.number != epoch:
            self._epoch = self._cut(epoch)
        cut = self._epoch
        place = int(cut.order[window - self._first_window[epoch]])
        shard = bisect_right(cut.ends, place)
        before = cut.ends[shard - 1] if shard else 0
        return shard, cut.offset + (place - before) * self._seq_len

    def _cut(self, epoch: int) -> "_Epoch":
        """Return how an epoch cuts the shards and in which order it visits the windows."""
        offset = self._offset(epoch)
        ends = np.cumsum(self._windows_per_shard(offset)).tolist()
        order = np.random.default_rng([self._seed, epoch, 1]).permutation(ends[-1])
        return _Epoch(epoch, offset, ends, order)

    def _offset(self, epoch: int) -> int:
        """Return where an epoch's first window begins in each shard, in [0, T)."""
        limit = min(self._seq_len, self._longest - self._seq_len)  # one window remains at least
        return int(np.random.default_rng([self._seed, epoch, 0]).integers(limit))

    def _windows_per_shard(self, offset: int) -> NDArray[np.int64]:
        """Return how many windows fit into each shard from the offset on."""
        return np.maximum((self._lengths - 1 - offset) // self._seq_len, 0)


def document_ids(ids_BT: NDArray[np.int64], end_of_text: int) -> NDArray[np.int64]:
    """Return the number of each token's document in its row, (B, T).

    The token that ends a document opens the next: it is what a text begins with when the model is
    asked for one, and its target is that document's first token.

    >>> document_ids(np.array([[5, 6, 0, 7, 0, 8]]), 0).tolist()
    [[0, 0, 1, 1, 2, 2]]
    """
    return np.cumsum(ids_BT == end_of_text, axis=1, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The windows of one epoch, kept because the next batch is nearly always of the same one."""

    number: int
    offset: int
    """First token of the first window of each shard."""
    ends: list[int]
    """Windows up to the end of each shard."""
    order: NDArray[np.int64]
    """(n_windows,) a permutation."""
