"""Where the keys and values of native passes lie, and which caches can say so.

Dimensions: B sequences, G key-value heads, S positions there is room for, K head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CACHED = (torch.float32, torch.bfloat16, torch.int8)
"""What keys and values may be stored as, in the order of `tinyllm::Stored`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """Where the keys and values of a pass lie: earlier ones, and places for new ones."""

    keys: Tensor
    """(layers, B, G, S, K), one of `CACHED`, the K numbers of a position together."""
    values: Tensor
    """Likewise, with the same strides."""
    scales: tuple[Tensor, Tensor] | None = None
    """With INT8, of keys and of values: (layers, B, G, S), fp32, strides a K-th of the numbers'."""
    starts: Sequence[int]
    """How many positions each of the B sequences has already."""


class RoomyCache:
    """A cache that tells where its numbers lie.

    No Protocol: every token asks whether an object is one, and a base class answers at once.
    """

    dtype: torch.dtype
    """Of the stored numbers."""

    def make_room(self, n_tokens: int) -> Room:
        """Return the memory for `n_tokens` more positions per sequence, which count as stored."""
        raise NotImplementedError
