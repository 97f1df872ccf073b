"""RMSNorm with the residual addition before it, on a card: kernels/cuda/rms_norm.cu.

Dimensions: M rows, D width.
"""

import ctypes

import torch
from torch import Tensor

from tinyllm.ops.cuda_rows import (
    Run,
    address,
    check_pointers,
    format_define,
    refuses_rows,
    team,
)
from tinyllm.ops.launch import Launch

SOURCE = "rms_norm.cu"
MAX_THREADS = 256
"""Of a row."""
WARPS = 1024
"""At most, in the backward pass: each keeps a gradient of the weight of its own."""
COLUMNS = 32
"""Of the weight's gradient that a block adds up."""


class _Forward(ctypes.Structure):
    """`RmsNormForward` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "sum", "y", "inverse")),
        *(("rows", ctypes.c_int64), ("width", ctypes.c_int32), ("eps", ctypes.c_float)),
    )


class _Backward(ctypes.Structure):
    """`RmsNormBackward` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("dy", "sum", "dsum", "weight", "inverse", "dx")),
        *(("partial", ctypes.c_void_p), ("rows", ctypes.c_int64), ("width", ctypes.c_int32)),
    )


class _Weight(ctypes.Structure):
    """`RmsNormWeight` of the source."""

    _fields_ = (
        *(("partial", ctypes.c_void_p), ("dweight", ctypes.c_void_p)),
        *(("slots", ctypes.c_int32), ("width", ctypes.c_int32)),
    )


def refuses(x: Tensor) -> str | None:
    """Return why the kernels cannot serve x, (..., D), None if they can."""
    return refuses_rows(x, MAX_THREADS)


def forward(
    run: Run, x_MD: Tensor, residual_MD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, s and r: s = x + residual in x's format, r = 1 / sqrt(mean(s^2) + eps), y = w s r.

    Args:
        run: executes launches.
        x_MD: contiguous, bf16, fp16 or fp32.
        residual_MD: likewise, the same format; None: s is x.
        weight_D: fp32.
        eps: added to the mean.

    Returns:
        y (M, D) and s (M, D) in x's format, r (M,) in fp32; the latter two for `backward`.
    """
    rows, width = x_MD.shape
    check_pointers(x_MD, residual_MD, weight_D)
    y, inverse = torch.empty_like(x_MD), x_MD.new_empty(rows, dtype=torch.float32)
    total = x_MD if residual_MD is None else torch.empty_like(x_MD)
    threads, rows_per_block, _ = block = team(width * x_MD.element_size())
    if rows:
        run(
            Launch(
                source=SOURCE,
                entry="rms_norm_forward",
                grid=(-(-rows // rows_per_block), 1, 1),
                block=block,
                shared_bytes=threads // 8,
                arguments=_Forward(
                    *(x_MD.data_ptr(), address(residual_MD), weight_D.data_ptr()),
                    *(total.data_ptr(), y.data_ptr(), inverse.data_ptr()),
                    *(rows, width, eps),
                ),
                defines=format_define(x_MD.dtype),
            )
        )
    return y, total, inverse


def backward(
    run: Run,
    dy_MD: Tensor,
    sum_MD: Tensor,
    inverse_M: Tensor,
    weight_D: Tensor,
    dsum_MD: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of s (which are those of x and of the residual) and of the weight.

    The weight's is the same in every run: rows are added in a fixed order.

    Args:
        run: executes launches.
        dy_MD: gradient of y, contiguous, the format of s.
        sum_MD: s, of `forward`.
        inverse_M: r, likewise.
        weight_D: fp32.
        dsum_MD: gradient that reaches s on other ways, or None.

    Returns:
        (M, D) in the format of s, and (D,) in fp32.
    """
    rows, width = sum_MD.shape
    check_pointers(dy_MD, sum_MD, weight_D, dsum_MD)
    threads, rows_per_block, _ = block = team(width * sum_MD.element_size())
    n_teams = min(rows, WARPS * 32 // threads)
    blocks = max(1, -(-n_teams // rows_per_block))
    slots = blocks * rows_per_block
    dx, dweight = torch.empty_like(sum_MD), torch.empty_like(weight_D)
    partial = weight_D.new_empty(slots, width)
    run(
        Launch(
            source=SOURCE,
            entry="rms_norm_backward",
            grid=(blocks, 1, 1),
            block=block,
            shared_bytes=threads // 8,
            arguments=_Backward(
                *(dy_MD.data_ptr(), sum_MD.data_ptr(), address(dsum_MD), weight_D.data_ptr()),
                *(inverse_M.data_ptr(), dx.data_ptr(), partial.data_ptr(), rows, width),
            ),
            defines=format_define(sum_MD.dtype),
        )
    )
    run(
        Launch(
            source=SOURCE,
            entry="rms_norm_weight",
            grid=(-(-width // COLUMNS), 1, 1),
            block=(256, 1, 1),
            shared_bytes=256 * 16,
            arguments=_Weight(partial.data_ptr(), dweight.data_ptr(), slots, width),
            defines=format_define(sum_MD.dtype),
        )
    )
    return dx, dweight
