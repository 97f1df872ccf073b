"""The KV cache: keys and values of the positions already seen, in memory set aside once.

Latent attention's cache is the same with one head, the rotated shared key as key and the latent as
value. Blocks with a window keep all positions and look at the last ones.
Not a paged cache: every row of a batch has the same length. Dimensions: B batch, G key-value heads,
T new positions, S positions so far.
"""

import torch
from torch import Tensor

from tinyllm.errors import DataError
from tinyllm.inference.stored import Stored, make_room
from tinyllm.model.sizes import ModelConfig
from tinyllm.ops.room import Room, RoomyCache


class LayerKV:
    """The keys and values of one layer."""

    def __init__(self, k_BGSK: Stored, v_BGSK: Stored) -> None:
        """Take the memory."""
        self._k, self._v = k_BGSK, v_BGSK
        self.length = 0

    @property
    def memory(self) -> tuple[Stored, Stored]:
        """All positions that there is room for, both (B, G, max_len, ...)."""
        return self._k, self._v

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new positions; return all so far as views, both (B, G, S, ...) in k's dtype."""
        end = self.length + k_BGTK.shape[2]
        self._k[:, :, self.length : end] = k_BGTK
        self._v[:, :, self.length : end] = v_BGTK
        self.length = end
        return self._k[:, :, :end].to(k_BGTK.dtype), self._v[:, :, :end].to(v_BGTK.dtype)


class KVCache(RoomyCache):
    """A `model.transformer.Cache` for sequences of at most `max_len` positions."""

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Set the memory aside.

        Args:
            config: the model's sizes.
            batch_size: rows.
            max_len: positions per row.
            dtype: of the stored values; narrower than the model's takes less memory.
            device: where the model is.

        Raises:
            DataError: the model has no positions beyond its `max_seq_len`.
        """
        if max_len > config.max_seq_len:
            raise DataError(
                f"context: a cache of {max_len} tokens is longer than the model's max_seq_len"
                f" {config.max_seq_len}; use a shorter one or train with a larger model.max_seq_len"
            )
        self.max_len, self.dtype = max_len, dtype
        self._device = torch.device(device)
        n_heads, d_k, d_v = config.cached
        shape = config.n_layers, batch_size, n_heads, max_len
        self._k = Stored.zeros(*shape, d_k, dtype=dtype, device=self._device)
        self._v = Stored.zeros(*shape, d_v, dtype=dtype, device=self._device)
        self.layers = [LayerKV(k, v) for k, v in zip(self._k, self._v, strict=True)]

    @property
    def length(self) -> int:
        """Positions stored so far."""
        return self.layers[0].length

    def plan(self, n_tokens: int) -> tuple[Tensor, Tensor | None]:
        """Return the positions of the next tokens, (T,), and what each may look at.

        The mask is None where attention needs none: a first pass (T = S) is plainly causal, and a
        single new token may look at everything. Else it is (T, S), True where a query may look.

        Raises:
            DataError: the tokens do not fit into the cache any more.
        """
        start, end = self.length, self._end(n_tokens)
        positions = torch.arange(start, end, device=self._device)
        if start == 0 or n_tokens == 1:
            return positions, None
        return positions, torch.arange(end, device=self._device) <= positions[:, None]

    def make_room(self, n_tokens: int) -> Room:
        """Return the memory for a pass that stores the next tokens of all layers itself.

        Raises:
            DataError: as `plan`.
        """
        start = self.reserve(n_tokens)
        return make_room(self._k, self._v, [start] * self._k.numbers.shape[1])

    def reserve(self, n_tokens: int) -> int:
        """Count the next positions as stored, whoever writes them; return the first.

        Raises:
            DataError: as `plan`.
        """
        start, end = self.length, self._end(n_tokens)
        for layer in self.layers:
            layer.length = end
        return start

    def _end(self, n_tokens: int) -> int:
        """Return the length with the next tokens, which have to fit."""
        end = self.length + n_tokens
        if end > self.max_len:
            raise DataError(
                f"context: {end} tokens do not fit into a cache of {self.max_len};"
                " shorten the prompt or ask for fewer tokens"
            )
        return end

    def memory(self) -> list[tuple[Stored, Stored]]:
        """Return each layer's keys and values with all positions that there is room for."""
        return [layer.memory for layer in self.layers]

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on; their memory is written again."""
        for layer in self.layers:
            layer.length = min(layer.length, length)

    @staticmethod
    def n_bytes(config: ModelConfig, batch_size: int, max_len: int, dtype: torch.dtype) -> int:
        """Return the memory that such a cache takes: keys and values of all layers."""
        n_heads, d_k, d_v = config.cached
        rows = batch_size * max_len * config.n_layers * n_heads
        return Stored.n_bytes(rows, d_k, dtype) + Stored.n_bytes(rows, d_v, dtype)
