"""One launch of a CUDA kernel as plain data, for a card's driver and for the emulator alike."""

import ctypes
from dataclasses import dataclass

Extent = tuple[int, int, int]
TENSOR_MAP_BYTES = 128
"""Of a `TensorMap` as a card reads it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorMap:
    """A tensor (B, heads, T, width) of 16-bit numbers, of which a kernel asks for boxes (TMA)."""

    address: int
    """Of its first number, a multiple of 16."""
    sizes: tuple[int, int, int, int]
    """Width, T, heads, B; what lies outside is read as zeros."""
    strides: tuple[int, int, int]
    """Of T, heads and B in bytes, multiples of 16; the width has no gaps."""
    rows: int
    """Of a box: so many positions of one head, 64 numbers each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What to run, by how many threads, on what."""

    source: str
    """A file of kernels/cuda, such as "rms_norm.cu"."""
    entry: str
    """Its kernel, by the name in KERNEL(name, Arguments, p, threads)."""
    grid: Extent
    """Blocks along x, y, z."""
    block: Extent
    """Threads of a block along x, y, z."""
    shared_bytes: int
    """Dynamic shared memory of a block."""
    arguments: ctypes.Structure
    """The kernel's one parameter: pointers, sizes and factors, the struct of the .cu file."""
    defines: tuple[str, ...] = ()
    """Macros the file is compiled with, such as "WIDTH=64": each set is its own program."""
    tensors: tuple[TensorMap, ...] = ()
    """With these, `arguments` begins with 128 bytes for each, filled in by whoever runs it."""
