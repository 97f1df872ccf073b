"""Keys and values of several sequences of different lengths, in memory set aside once.

A slot is a row of the cache that belongs to one sequence at a time. A pass works either on one slot
and several new positions (a part of a prompt) or on neighbouring slots with one new position each
(a token for everybody). Neighbours are a view: no keys are gathered. Dimensions: B slots of a pass,
G key-value heads, T new positions, S positions looked at, K head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinyllm.inference.stored import Stored, make_room
from tinyllm.model.sizes import ModelConfig
from tinyllm.ops.room import Room, RoomyCache


class SlotCache:
    """The memory of all slots and layers."""

    def __init__(
        self, config: ModelConfig, n_slots: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Set the memory aside: each slot takes a sequence as long as the model's context."""
        n_heads, d_k, d_v = config.cached
        shape = config.n_layers, n_slots, n_heads, config.max_seq_len
        self._k, self._v = (Stored.zeros(*shape, d, dtype=dtype, device=device) for d in (d_k, d_v))

    def rows(self, first: int, starts: Sequence[int]) -> "SlotRows":
        """Return neighbouring slots as the cache of one pass.

        Args:
            first: the lowest slot.
            starts: where the new positions begin, for this slot and those after it.
        """
        rows = slice(None), slice(first, first + len(starts))
        return SlotRows(self._k[rows], self._v[rows], starts)

    def copy(self, source: int, target: int, n: int) -> None:
        """Copy the first n positions of a slot to another one."""
        for part in (self._k, self._v):
            part[:, target, :, :n] = part[:, source, :, :n]

    def store(self, slot: int, keys_LGSK: Stored, values_LGSK: Stored) -> None:
        """Fill the start of a slot with keys and values of all layers, of the cache's format."""
        n = keys_LGSK.numbers.shape[2]
        self._k[:, slot, :, :n] = keys_LGSK
        self._v[:, slot, :, :n] = values_LGSK

    def fetch(self, slot: int, n: int) -> tuple[Stored, Stored]:
        """Return copies of the first n positions' keys and values, both (layers, G, n, K)."""
        return self._k[:, slot, :, :n].clone(), self._v[:, slot, :, :n].clone()


class SlotRows(RoomyCache):
    """A `model.transformer.Cache` for one pass."""

    def __init__(self, k_LBGSK: Stored, v_LBGSK: Stored, starts: Sequence[int]) -> None:
        self._starts = list(starts)
        self._k, self._v, self.dtype = k_LBGSK, v_LBGSK, k_LBGSK.numbers.dtype
        self.layers: list[SlotLayer | SlotsLayer] = []
        """One per block, once the pass is planned."""

    def make_room(self, n_tokens: int) -> Room:
        """Return the memory for a pass that stores the new positions itself."""
        return make_room(self._k, self._v, self._starts)

    def plan(self, n_tokens: int) -> tuple[Tensor, Tensor | None]:
        """Return positions, (T,) or (B, 1), and mask, None or (T, S) or (B, 1, 1, S)."""
        pairs, device = zip(self._k, self._v, strict=True), self._k.numbers.device
        end = max(self._starts) + n_tokens
        seen_S = torch.arange(end, device=device)
        if len(self._starts) == 1:
            start = self._starts[0]
            self.layers = [SlotLayer(k, v, start, end) for k, v in pairs]
            plain = start == 0 or n_tokens == 1
            return seen_S[start:], None if plain else seen_S <= seen_S[start:, None]
        if n_tokens != 1:
            raise ValueError(f"{len(self._starts)} slots take one position each, not {n_tokens}")
        rows_B = torch.arange(len(self._starts), device=device)
        starts_B = torch.tensor(self._starts, device=device)
        self.layers = [SlotsLayer(k, v, rows_B, starts_B, end) for k, v in pairs]
        return starts_B[:, None], seen_S <= starts_B[:, None, None, None]


class SlotLayer:
    """One layer of one slot."""

    def __init__(self, k_1GSK: Stored, v_1GSK: Stored, start: int, end: int) -> None:
        self._k, self._v, self._start = k_1GSK[:, :, :end], v_1GSK[:, :, :end], start

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions; return all so far, both (1, G, S, K) in k's dtype."""
        self._k[:, :, self._start :] = k_BGTK
        self._v[:, :, self._start :] = v_BGTK
        return self._k.to(k_BGTK.dtype), self._v.to(v_BGTK.dtype)


class SlotsLayer:
    """One layer of several slots that get one position each."""

    def __init__(
        self, k_BGSK: Stored, v_BGSK: Stored, rows_B: Tensor, starts_B: Tensor, end: int
    ) -> None:
        self._k, self._v, self._at = k_BGSK[:, :, :end], v_BGSK[:, :, :end], (rows_B, starts_B)

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store a position per slot, T = 1; return (B, G, S, K) up to the longest one's."""
        rows_B, starts_B = self._at
        self._k[rows_B, :, starts_B] = k_BGTK[:, :, 0]
        self._v[rows_B, :, starts_B] = v_BGTK[:, :, 0]
        return self._k.to(k_BGTK.dtype), self._v.to(v_BGTK.dtype)
