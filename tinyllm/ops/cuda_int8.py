"""INT8 on a card: quantising rows, and linear layers with few rows (W8A16) and with many (W8A8).

The same packed weight serves both; kernels/cuda/int8_weight.h has its layout. Dimensions: M rows,
N outputs, K inputs.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllm.ops.cuda_rows import FORMATS, Run, check_pointers, format_define, refuses_rows, team
from tinyllm.ops.launch import Launch
from tinyllm.ops.reference import MAX_K

QUANTIZE_THREADS = 1024
"""Most that share a row."""
PANEL, TILE = 32, 32
"""Outputs and inputs that are packed together."""
STEP = 64
"""Inputs are padded to a multiple: what W8A8 takes at once."""
MAX_W8A16_ROWS = 8
BLOCK = 128
"""Rows, and outputs, that a block of W8A8 makes."""
W8A8_BYTES = 3 * (BLOCK * STEP + BLOCK * STEP)
"""Three stages of activations and weights."""
W8A16_BYTES = 8 * MAX_W8A16_ROWS * (PANEL + 1) * 4
"""fp32 sums of 8 warps, with one unused behind each row."""


class _Quantize(ctypes.Structure):
    """`QuantizeRows` of quantize.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "q", "scale")),
        *(("rows", ctypes.c_int64), ("width", ctypes.c_int32), ("stride", ctypes.c_int32)),
    )


class _Dequantize(ctypes.Structure):
    """`DequantizeRows` of quantize.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "scale", "x")),
        *(("rows", ctypes.c_int64), ("width", ctypes.c_int32)),
    )


class _Weight(ctypes.Structure):
    """`Int8Weight` of int8_weight.h."""

    _fields_ = (
        *(("packed", ctypes.c_void_p), ("scale", ctypes.c_void_p)),
        *((name, ctypes.c_int32) for name in ("outputs", "inputs", "panels", "tiles")),
    )


class _W8a16(ctypes.Structure):
    """`LinearW8a16` of its source."""

    _fields_ = (
        *(("weight", _Weight), ("x", ctypes.c_void_p), ("y", ctypes.c_void_p)),
        ("rows", ctypes.c_int32),
    )


class _W8a8(ctypes.Structure):
    """`LinearW8a8` of its source."""

    _fields_ = (
        *(("weight", _Weight), ("q", ctypes.c_void_p), ("scale", ctypes.c_void_p)),
        *(("y", ctypes.c_void_p), ("rows", ctypes.c_int64)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedWeight:
    """An INT8 weight in the order in which the kernels read it."""

    packed: Tensor
    """Bytes, (panels, tiles, 2, 32, 16)."""
    scale: Tensor
    """fp32, one per output, zeros behind the last one up to a whole panel."""
    n_outputs: int
    n_inputs: int

    def arguments(self) -> _Weight:
        """Return it as the kernels' struct."""
        return _Weight(
            *(self.packed.data_ptr(), self.scale.data_ptr(), self.n_outputs, self.n_inputs),
            *self.packed.shape[:2],
        )


def refuses_quantize(x: Tensor) -> str | None:
    """Return why `quantize_per_row` cannot serve x, (..., K), None if it can."""
    return refuses_rows(x, QUANTIZE_THREADS)


def quantize_per_row(run: Run, x_MK: Tensor, stride: int | None = None) -> tuple[Tensor, Tensor]:
    """Return what `reference.quantize_per_row` returns, equal in every bit.

    Args:
        run: executes launches.
        x_MK: contiguous, bf16, fp16 or fp32.
        stride: width of the result, zeros behind the K numbers; None: K.

    Returns:
        int8 (M, stride), fp32 scales (M,).
    """
    rows, width = x_MK.shape
    stride = width if stride is None else stride
    check_pointers(x_MK)
    q = x_MK.new_empty((rows, stride), dtype=torch.int8)
    scale = x_MK.new_empty(rows, dtype=torch.float32)
    threads, rows_per_block, _ = block = team(stride * x_MK.element_size())
    if rows:
        run(
            Launch(
                source="quantize.cu",
                entry="quantize_rows",
                grid=(-(-rows // rows_per_block), 1, 1),
                block=block,
                shared_bytes=threads // 8,
                arguments=_Quantize(
                    *(x_MK.data_ptr(), q.data_ptr(), scale.data_ptr(), rows, width, stride)
                ),
                defines=format_define(x_MK.dtype),
            )
        )
    return q, scale


def dequantize_per_row(run: Run, q_MK: Tensor, scale_M: Tensor, dtype: torch.dtype) -> Tensor:
    """Return q * scale, (M, K), rounded to a format; K is a multiple of 16."""
    check_pointers(q_MK)
    x = q_MK.new_empty(q_MK.shape, dtype=dtype)
    rows, width = q_MK.shape
    if width % 16:
        raise ValueError(f"rows of {width} bytes are not whole vectors of 16")
    if rows:
        run(
            Launch(
                source="quantize.cu",
                entry="dequantize_rows",
                grid=(-(-rows * width // (16 * 256)), 1, 1),
                block=(256, 1, 1),
                shared_bytes=0,
                arguments=_Dequantize(
                    *(q_MK.data_ptr(), scale_M.data_ptr(), x.data_ptr(), rows, width)
                ),
                defines=format_define(dtype),
            )
        )
    return x


def pack(weight_q: Tensor, weight_scale: Tensor) -> PackedWeight:
    """Return a weight (N, K), int8, with its scales (N,), fp32, in the kernels' order."""
    n, k = weight_q.shape
    if k > MAX_K:
        raise ValueError(f"K = {k} could overflow int32 sums; at most {MAX_K}")
    padded = F.pad(weight_q, (0, -k % STEP, 0, -n % PANEL))
    panels, tiles = padded.shape[0] // PANEL, padded.shape[1] // TILE
    # Output 8 a + 4 f + 2 h + e of a panel is row 8 h + 2 a + e of fragment f; input
    # 16 w + 4 c + b of a tile is byte b of word 2 w + h in the lanes with l % 4 = c.
    split = padded.view(panels, 4, 2, 2, 2, tiles, 2, 4, 4)  # p a f h e, t w c b
    packed = split.permute(0, 5, 2, 1, 4, 7, 6, 3, 8)  # p t f (a e c) (w h b)
    return PackedWeight(
        packed=packed.reshape(panels, tiles, 2, 32, 16).contiguous(),
        scale=F.pad(weight_scale, (0, -n % PANEL)).contiguous(),
        n_outputs=n,
        n_inputs=k,
    )


def linear_w8a16(run: Run, x_MK: Tensor, weight: PackedWeight) -> Tensor:
    """Return (x W^T) scale, (M, N) in x's format, for at most 8 rows; sums are fp32.

    Args:
        run: executes launches.
        x_MK: contiguous bf16 or fp16; K a multiple of 4.
        weight: of `pack`.
    """
    rows, width = x_MK.shape
    if x_MK.dtype == torch.float32 or x_MK.dtype not in FORMATS or width % 4:
        raise ValueError(f"bf16 or fp16 and K divisible by 4 are needed, got {x_MK.dtype}, {width}")
    if rows > MAX_W8A16_ROWS or width != weight.n_inputs:
        raise ValueError(f"x is {rows} x {width}, the weight has {weight.n_inputs} inputs")
    check_pointers(x_MK)
    y = x_MK.new_empty(rows, weight.n_outputs)
    run(
        Launch(
            source="linear_w8a16.cu",
            entry="linear_w8a16",
            grid=(weight.packed.shape[0], 1, 1),
            block=(256, 1, 1),
            shared_bytes=W8A16_BYTES,
            arguments=_W8a16(weight.arguments(), x_MK.data_ptr(), y.data_ptr(), rows),
            defines=format_define(x_MK.dtype),
        )
    )
    return y


def linear_w8a8(run: Run, x_MK: Tensor, weight: PackedWeight) -> Tensor:
    """Return `reference.bind_linear_w8a8(...)(x)`, (M, N) in x's format, equal in every bit.

    Two launches: the rows are quantised, then multiplied.

    Args:
        run: executes launches.
        x_MK: contiguous, rows as `refuses_quantize` wants them.
        weight: of `pack`.
    """
    rows, width = x_MK.shape
    if width != weight.n_inputs:
        raise ValueError(f"x has {width} inputs, the weight has {weight.n_inputs}")
    y = x_MK.new_empty(rows, weight.n_outputs)
    panels, tiles = weight.packed.shape[:2]
    q, scale = quantize_per_row(run, x_MK, tiles * TILE)
    if rows:
        run(
            Launch(
                source="linear_w8a8.cu",
                entry="linear_w8a8",
                grid=(-(-panels * PANEL // BLOCK), -(-rows // BLOCK), 1),
                block=(256, 1, 1),
                shared_bytes=W8A8_BYTES,
                arguments=_W8a8(
                    *(weight.arguments(), q.data_ptr(), scale.data_ptr(), y.data_ptr(), rows)
                ),
                defines=format_define(x_MK.dtype),
            )
        )
    return y
