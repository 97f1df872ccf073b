"""Every operation in plain torch: the definition that all other backends equal to the last bit.

Not fast. Dimensions: M rows, N outputs, K inputs.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

MAX_K = 65536
"""Most inputs of a linear layer: K * 255 * 127 < 2^31 keeps every int32 sum from overflowing."""
TINY_ABSMAX = 2.0**-100
"""Rows with a smaller largest magnitude count as zero: 127 / absmax would leave fp32."""


def quantize_per_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x as INT8 with one scale per row: x is about q * scale.

    scale = max|x| / 127 and q = round(x * (127 / max|x|)), both in fp32, halves to even, q in
    [-127, 127]. A row of zeros gives scale 0, a row with NaN or infinity gives scale NaN, and q = 0
    in both.

    Args:
        x: (..., K), floating point.

    Returns:
        INT8 values (..., K) and fp32 scales (...).
    """
    x = x.float()
    absmax = x.abs().amax(dim=-1, keepdim=True)
    usable = absmax.isfinite() & (absmax >= TINY_ABSMAX)
    # With a number in its place, torch may multiply by a rounded reciprocal instead of dividing.
    steps = torch.full_like(absmax, 127.0)
    inverse = torch.where(usable, steps / absmax, 0.0)
    q = (x * inverse).round().nan_to_num(0.0).clamp(-127, 127).to(torch.int8)
    scale = torch.where(usable, absmax / steps, torch.where(absmax.isfinite(), 0.0, math.nan))
    return q, scale.squeeze(-1)


def bind_linear_w8a8(weight_q: Tensor, weight_scale: Tensor) -> Callable[[Tensor], Tensor]:
    """Return x -> y = (sum_k q_x q_w) * scale_x * scale_w, multiplied in fp32 from left to right.

    The sum is taken in fp64, where it is exact (below 2^53) in any order.

    Args:
        weight_q: (N, K), int8.
        weight_scale: (N,), fp32.
    """
    weight_KN = weight_q.double().T

    def linear(x: Tensor) -> Tensor:
        q, scale = quantize_per_row(x)
        sums = (q.double() @ weight_KN).to(torch.int32)
        return (sums.float() * scale[..., None] * weight_scale).to(x.dtype)

    return linear
