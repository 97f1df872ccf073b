"""One launch of a CUDA kernel as plain data, for a card's driver and for the emulator alike."""

import ctypes
from dataclasses import dataclass

Extent = tuple[int, int, int]


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
