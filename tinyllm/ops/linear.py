"""INT8 and 4-bit arithmetic as callers use it: arguments checked, backend chosen.

Symmetric INT8: weights have one scale per output, activations one per row (per token), both
absmax / 127. Weights of 4 bits have one scale per output and 32 inputs (`tinyllm.ops.int4`). All
backends give the same bits, but for few rows of 16-bit activations on a card
(`cuda.bind_linear_w8a8`). Dimensions: M rows, N outputs, K inputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tinyllm.ops.int4 import GROUP
from tinyllm.ops.reference import MAX_K
from tinyllm.ops.registry import select


def quantize_per_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x as INT8 with one scale per row; see `reference.quantize_per_row` for the formula.

    Args:
        x: (..., K), floating point, K at least 1.

    Returns:
        INT8 values (..., K) in [-127, 127] and fp32 scales (...).
    """
    if not x.is_floating_point() or x.shape[-1] < 1:
        raise ValueError(f"rows of floating-point numbers are needed, got {_show(x)}")
    quantized: tuple[Tensor, Tensor] = select("quantize_per_row", x).function(x)
    return quantized


def linear_w8a8(x: Tensor, weight_q: Tensor, weight_scale: Tensor) -> Tensor:
    """Return x W^T with INT8 arithmetic: x is quantised per row, sums are int32, the result fp32.

    y = (float(sum_k q_x q_w) * scale_x) * scale_w. For repeated use of a weight, bind it once.

    Args:
        x: (..., K), floating point.
        weight_q: (N, K), int8 in [-127, 127].
        weight_scale: (N,), fp32.

    Returns:
        (..., N) in x's dtype.
    """
    return bind_linear_w8a8(weight_q, weight_scale)(x)


def bind_linear_w8a8(weight_q: Tensor, weight_scale: Tensor) -> Callable[[Tensor], Tensor]:
    """Choose a backend for a weight, prepare the weight for it, and return x -> `linear_w8a8`.

    Later changes of the weight have no effect.

    Raises:
        ValueError: shapes or dtypes do not fit, a weight is -128, or K is beyond the int32 bound.
    """
    if weight_q.dtype != torch.int8 or weight_q.dim() != 2 or weight_q.numel() == 0:
        raise ValueError(f"weight_q must be a matrix of int8, got {_show(weight_q)}")
    if weight_scale.dtype != torch.float32 or weight_scale.shape != weight_q.shape[:1]:
        raise ValueError(f"weight_scale must be fp32, one per output, got {_show(weight_scale)}")
    if weight_q.shape[1] > MAX_K:
        raise ValueError(f"K = {weight_q.shape[1]} could overflow int32 sums; at most {MAX_K}")
    if bool((weight_q == -128).any()):
        raise ValueError("weight_q has -128; symmetric INT8 ends at -127")
    bound: Callable[[Tensor], Tensor] = select("linear_w8a8", weight_q).function(
        weight_q, weight_scale
    )
    return bound


def in_two_terms(bound: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Give a bound layer activations of 16 bits: x = q1 s1 + q2 s2, both rounded as one is with 8.

    The second term is what rounding the first left over, at most s1 / 2 <= absmax / 254; its own
    rounding leaves at most s2 / 2 <= absmax / 64516.

    Args:
        bound: what `bind_linear_w8a8` or `bind_linear_w4a8` returned.

    Returns:
        A function of x (..., K), floating point, to (..., N) in fp32.
    """

    def linear(x: Tensor) -> Tensor:
        """Return both terms' products, added."""
        x = x.float()
        q, scale = quantize_per_row(x)
        return bound(x) + bound(x - q * scale.unsqueeze(-1))

    return linear


def bind_linear_w4a8(weight_q: Tensor, weight_scale: Tensor) -> Callable[[Tensor], Tensor]:
    """Do what `bind_linear_w8a8` does for weights of 4 bits; see `reference.bind_linear_w4a8`.

    Args:
        weight_q: (N, K / 2), uint8, two numbers in a byte.
        weight_scale: (N, ceil(K / 32)), bf16.

    Raises:
        ValueError: shapes or dtypes do not fit, or K is beyond what the native code has room for.
    """
    if weight_q.dtype != torch.uint8 or weight_q.dim() != 2 or weight_q.numel() == 0:
        raise ValueError(f"weight_q must be a matrix of uint8, got {_show(weight_q)}")
    n, k = weight_q.shape[0], 2 * weight_q.shape[1]
    if weight_scale.dtype != torch.bfloat16 or weight_scale.shape != (n, -(-k // GROUP)):
        raise ValueError(
            f"weight_scale must be bf16, one per output and {GROUP} inputs, got"
            f" {_show(weight_scale)} for {n} outputs of {k} inputs"
        )
    if k > MAX_K:
        raise ValueError(f"K = {k} is too large; at most {MAX_K}")
    bound: Callable[[Tensor], Tensor] = select("linear_w4a8", weight_q).function(
        weight_q, weight_scale
    )
    return bound


def _show(x: Tensor) -> str:
    """Return a tensor's shape and dtype for a message."""
    return f"{tuple(x.shape)} of {x.dtype}"
