"""RoPE and SwiGLU on a card: kernels/cuda/pointwise.cu.

Dimensions: M rows (tokens of all sequences), T positions, H query heads, G key-value heads, K head
width, F feed-forward width.
"""

import ctypes

import torch
from torch import Tensor

from tinyllm.ops.cuda_rows import (
    FORMATS,
    VECTOR_BYTES,
    Run,
    address,
    check_pointers,
    format_define,
)
from tinyllm.ops.launch import Launch

SOURCE = "pointwise.cu"
THREADS = 256
MOST_VECTORS = 2**32 - 2**16
"""The kernels count them in 32 bits."""


class _Rope(ctypes.Structure):
    """`Rope` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "cos", "sin")),
        *(("q_stride", ctypes.c_int64), ("k_stride", ctypes.c_int64)),
        *(("tokens", ctypes.c_uint32), ("table_rows", ctypes.c_uint32)),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "width")),
        ("direction", ctypes.c_float),
    )


class _Swiglu(ctypes.Structure):
    """`Swiglu` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate", "up", "dy", "y", "dgate", "dup")),
        *(("stride", ctypes.c_int64), ("rows", ctypes.c_uint32), ("width", ctypes.c_uint32)),
    )


def refuses(dtype: torch.dtype, width: int) -> str | None:
    """Return why SwiGLU of F = width or RoPE of K / 2 = width cannot be had, None if they can."""
    if dtype not in FORMATS:
        return f"it knows bf16, fp16 and fp32, not {dtype}"
    if width % (VECTOR_BYTES // dtype.itemsize):
        return f"{width} numbers of {dtype} are not whole vectors of {VECTOR_BYTES} bytes"
    return None


def rope(
    run: Run, q_MHK: Tensor, k_MGK: Tensor, cos_TA: Tensor, sin_TA: Tensor, *, back: bool = False
) -> None:
    """Turn queries and keys in place, as `model.rope.apply_rope` does.

    Args:
        run: executes launches.
        q_MHK: the heads of a token together; tokens may have other numbers between them.
        k_MGK: likewise, the same format.
        cos_TA: of the angles, contiguous fp32, A = K / 2; token i has row i % T: with the positions
            of one sequence for all of them, or with a row for each token.
        sin_TA: likewise.
        back: by the opposite angles: the gradient of the turned from that of the results.
    """
    tokens, heads, width = q_MHK.shape
    kv_heads = k_MGK.shape[1]
    check_pointers(cos_TA, sin_TA)
    for x in (q_MHK, k_MGK):
        aligned = all(n * x.element_size() % VECTOR_BYTES == 0 for n in (x.stride(0), width // 2))
        if x.stride()[1:] != (width, 1) or not aligned or x.data_ptr() % VECTOR_BYTES:
            raise ValueError(f"whole vectors are needed, got {tuple(x.shape)}, {x.stride()}")
    vectors = tokens * (heads + kv_heads) * (width // 2 * q_MHK.element_size() // VECTOR_BYTES)
    _run(
        *(run, "rope", vectors, q_MHK.dtype),
        _Rope(
            *(x.data_ptr() for x in (q_MHK, k_MGK, cos_TA, sin_TA)),
            *(q_MHK.stride(0), k_MGK.stride(0), tokens, cos_TA.shape[0]),
            *(heads, kv_heads, width, -1.0 if back else 1.0),
        ),
    )


def swiglu(run: Run, gate_MF: Tensor, up_MF: Tensor) -> Tensor:
    """Return silu(gate) * up, (M, F); computed in fp32, rounded once.

    Args:
        run: executes launches.
        gate_MF: its rows may be parts of longer ones, as after one product for gate and up.
        up_MF: likewise, with the same strides.
    """
    y = gate_MF.new_empty(gate_MF.shape)
    _swiglu(run, "swiglu_forward", gate_MF, up_MF, (None, y, None, None))
    return y


def swiglu_backward(
    run: Run, dy_MF: Tensor, gate_MF: Tensor, up_MF: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up from that of `swiglu`'s result, which is contiguous."""
    check_pointers(dy_MF)
    dgate, dup = gate_MF.new_empty(gate_MF.shape), gate_MF.new_empty(gate_MF.shape)
    _swiglu(run, "swiglu_backward", gate_MF, up_MF, (dy_MF, None, dgate, dup))
    return dgate, dup


def _swiglu(
    run: Run, entry: str, gate_MF: Tensor, up_MF: Tensor, others: tuple[Tensor | None, ...]
) -> None:
    """Launch one of the two kernels; `others` are dy, y, dgate, dup."""
    rows, width = gate_MF.shape
    for x in (gate_MF, up_MF):
        row_bytes = x.stride(0) * x.element_size()
        aligned = row_bytes % VECTOR_BYTES == 0 and x.data_ptr() % VECTOR_BYTES == 0
        if x.stride() != (gate_MF.stride(0), 1) or not aligned or refuses(x.dtype, width):
            raise ValueError(f"whole vectors are needed, got {tuple(x.shape)}, {x.stride()}")
    _run(
        *(run, entry, rows * width * gate_MF.element_size() // VECTOR_BYTES, gate_MF.dtype),
        _Swiglu(
            *(gate_MF.data_ptr(), up_MF.data_ptr(), *(address(x) for x in others)),
            *(gate_MF.stride(0), rows, width),
        ),
    )


def _run(
    run: Run, entry: str, vectors: int, dtype: torch.dtype, arguments: ctypes.Structure
) -> None:
    """Launch a thread per vector."""
    if vectors > MOST_VECTORS:
        raise ValueError(f"{vectors} vectors are too many for one launch; divide the rows")
    if vectors:
        run(
            Launch(
                source=SOURCE,
                entry=entry,
                grid=(-(-vectors // THREADS), 1, 1),
                block=(THREADS, 1, 1),
                shared_bytes=0,
                arguments=arguments,
                defines=format_define(dtype),
            )
        )
