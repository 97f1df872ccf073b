"""Keys or values as a cache holds them: in a float format, or in INT8 with scales.

INT8 is `ops.reference.quantize_per_row` of a head's K numbers at a position, with one fp32 scale:
K + 4 bytes where bf16 has 2 K. A position is quantised when it is stored and its neighbours play no
part, so a prompt at once, in parts or token by token leaves the same bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyllm.ops.reference import quantize_per_row
from tinyllm.ops.room import Room

Index = int | slice | tuple[int | slice | Tensor, ...]
"""Of all dimensions but the last."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Numbers in memory; whoever indexes gets a view."""

    numbers: Tensor
    """(..., K)."""
    scales: Tensor | None
    """(...), fp32, where the numbers are INT8."""

    @classmethod
    def zeros(
        cls, *shape: int, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> "Stored":
        """Set memory aside for numbers of a shape (..., K)."""
        scales = torch.zeros(shape[:-1], device=device) if dtype is torch.int8 else None
        return cls(torch.zeros(shape, dtype=dtype, device=device), scales)

    @property
    def tensors(self) -> list[Tensor]:
        """Where everything lies, the numbers first."""
        return [self.numbers] if self.scales is None else [self.numbers, self.scales]

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return what `tensors` will hold of numbers (..., K)."""
        return [x.to(self.numbers.dtype)] if self.scales is None else list(quantize_per_row(x))

    def to(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers, (..., K); those of INT8 are multiplied by their scales in fp32."""
        if self.scales is None:
            return self.numbers.to(dtype)
        return (self.numbers * self.scales[..., None]).to(dtype)

    def clone(self) -> "Stored":
        """Return a copy with memory of its own."""
        return Stored(self.numbers.clone(), None if self.scales is None else self.scales.clone())

    def __getitem__(self, index: Index) -> "Stored":
        return Stored(self.numbers[index], None if self.scales is None else self.scales[index])

    def __setitem__(self, index: Index, x: "Tensor | Stored") -> None:
        """Store numbers, or take over stored ones as they are: of the same format."""
        parts = x.tensors if isinstance(x, Stored) else self.encode(x)
        for memory, part in zip(self.tensors, parts, strict=True):
            memory[index] = part

    def __iter__(self) -> Iterator["Stored"]:
        return (self[i] for i in range(len(self.numbers)))

    @staticmethod
    def n_bytes(n: int, width: int, dtype: torch.dtype) -> int:
        """Return what n rows of `width` numbers take."""
        scale = torch.float32.itemsize if dtype is torch.int8 else 0
        return n * (width * dtype.itemsize + scale)


def make_room(keys: Stored, values: Stored, starts: Sequence[int]) -> Room:
    """Return all layers' memory as a pass of native code takes it."""
    scales = None
    if keys.scales is not None and values.scales is not None:
        scales = keys.scales, values.scales
    return Room(keys=keys.numbers, values=values.numbers, scales=scales, starts=starts)
