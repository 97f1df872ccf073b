"""What the CUDA kernels' host sides share: formats, and rows divided among threads.

An operation takes `run`, which executes a `Launch`: a card's driver, or the emulator in tests. It
makes its results beside its inputs, so the same lines serve both.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tinyllm.ops.launch import Extent, Launch

Run = Callable[[Launch], object]
"""Executes a launch, or puts it into a queue that is executed in order."""
FORMATS = {torch.bfloat16: "bf16", torch.float16: "half", torch.float32: "float"}
"""What kernels/cuda/device.h calls them."""
LANES = 32
VECTOR_BYTES = 16
HELD = 4
"""Vectors per thread: kHeld of kernels/cuda/rows.h."""
BLOCK_THREADS = 128
"""Of a block whose rows have a warp each."""


def format_define(dtype: torch.dtype) -> tuple[str, ...]:
    """Return the macro that compiles a source for a format."""
    return (f"FORMAT={FORMATS[dtype]}",)


def refuses_rows(x: Tensor, max_threads: int) -> str | None:
    """Return why rows of x (its last dimension) cannot be held by a block, None if they can."""
    if x.dtype not in FORMATS:
        return f"it knows bf16, fp16 and fp32, not {x.dtype}"
    row_bytes = x.shape[-1] * x.element_size()
    if row_bytes == 0 or row_bytes % VECTOR_BYTES:
        return f"rows of {row_bytes} bytes are not whole vectors of {VECTOR_BYTES}"
    if row_bytes > max_threads * HELD * VECTOR_BYTES:
        return f"rows of {row_bytes} bytes are more than a block holds"
    return None


def team(row_bytes: int) -> Extent:
    """Return a block: the threads that share a row, and its rows."""
    warps = -(-row_bytes // (LANES * HELD * VECTOR_BYTES))
    return warps * LANES, BLOCK_THREADS // LANES if warps == 1 else 1, 1


def check_pointers(*tensors: Tensor | None) -> None:
    """Raise where a kernel could not read a tensor by whole vectors.

    Raises:
        ValueError: it is not contiguous, or does not begin at a multiple of 16 bytes.
    """
    for x in tensors:
        if x is not None and not (x.is_contiguous() and x.data_ptr() % VECTOR_BYTES == 0):
            raise ValueError(f"a contiguous, aligned tensor is needed, got {tuple(x.shape)}")


def address(x: Tensor | None) -> int | None:
    """Return where a tensor begins, None (a null pointer) without one."""
    return None if x is None else x.data_ptr()
