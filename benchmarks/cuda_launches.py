"""The launches of every CUDA kernel at real sizes, recorded and not run: what the gates inspect.

Nothing is repeated by hand: programs, blocks and shared memory are what the host sides ask for.
"""

from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
from torch import Tensor

from tinyllm.ops import (
    cuda_adamw8bit,
    cuda_attention,
    cuda_cross_entropy,
    cuda_decode,
    cuda_hopper,
    cuda_int8,
    cuda_norm,
    cuda_pointwise,
)
from tinyllm.ops.adamw8bit import Moments, Rates
from tinyllm.ops.launch import Launch

FORMATS = (torch.bfloat16, torch.float16, torch.float32)
HEADS = ((32, 32), (64, 64), (96, 64), (128, 128))
"""Widths of queries and of values; 96 and 64 are those of latent attention."""
ROWS, WIDTH = 24, 2048

Run = Callable[[Launch], object]


def launches(
    architecture: str,
    formats: Sequence[torch.dtype] = FORMATS,
    heads: Sequence[tuple[int, int]] = HEADS,
) -> list[Launch]:
    """Return every launch on a kind of card, such as "sm_86".

    Sizes are those of real layers but for the number of rows.
    """
    major, minor = int(architecture[3:-1]), int(architecture[-1])
    roomy = (major, minor) in cuda_attention.ROOMY
    hopper = (major, minor) == cuda_hopper.CAPABILITY
    with (  # no card to be asked
        patch.object(cuda_attention, "is_roomy", lambda device: roomy),
        patch.object(cuda_hopper, "is_hopper", lambda: hopper),
    ):
        return _record(formats, heads)


def _record(formats: Sequence[torch.dtype], heads: Sequence[tuple[int, int]]) -> list[Launch]:
    """Return what every host side wants to launch."""
    recorded: list[Launch] = []
    for dtype in formats:
        for widths in heads:
            if dtype in cuda_attention.FORMATS:
                _attention(recorded.append, dtype, *widths)
            if dtype in cuda_attention.FORMATS and not cuda_decode.refuses(dtype, widths[1]):
                _decode(recorded.append, dtype, widths[1])
        _norm(recorded.append, dtype)
        _int8(recorded.append, dtype)
        _pointwise(recorded.append, dtype)
        _cross_entropy(recorded.append, dtype)
    _adamw8bit(recorded.append)
    return recorded


def _attention(run: Run, dtype: torch.dtype, width: int, value_width: int) -> None:
    """Run a head forward, by both kernels where there are two, and backward."""

    def run_both(launch: Launch) -> None:
        run(launch)
        if cuda_hopper.refuses(launch) is None:
            run(cuda_hopper.of(launch))

    def heads(width: int) -> Tensor:
        return torch.zeros(1, 1, ROWS, width, dtype=dtype)

    q, k, v, d_o = heads(width), heads(width), heads(value_width), heads(value_width)
    o, lse = cuda_attention.forward(run_both, q, k, v, None, 0, 1.0)
    cuda_attention.backward(run, d_o, q, k, v, o, lse, None, 0, 1.0)


def _norm(run: Run, dtype: torch.dtype) -> None:
    """RMSNorm with a residual, and its gradient."""
    x, weight = torch.zeros(ROWS, WIDTH, dtype=dtype), torch.ones(WIDTH)
    y, total, inverse = cuda_norm.forward(run, x, x, weight, 1e-5)
    cuda_norm.backward(run, y, total, inverse, weight, x)


def _int8(run: Run, dtype: torch.dtype) -> None:
    """Quantised rows and both linear layers."""
    x = torch.zeros(ROWS, WIDTH, dtype=dtype)
    weight = cuda_int8.pack(torch.zeros(64, WIDTH, dtype=torch.int8), torch.ones(64))
    q, scale = cuda_int8.quantize_per_row(run, x)
    cuda_int8.dequantize_per_row(run, q, scale, dtype)
    cuda_int8.linear_w8a8(run, x, weight)
    if dtype != torch.float32:
        cuda_int8.linear_w8a16(run, x[: cuda_int8.MAX_W8A16_ROWS], weight)


def _decode(run: Run, dtype: torch.dtype, width: int) -> None:
    """One token over a cache in the format of its query, and over one in INT8."""
    q, lengths = torch.zeros(1, 8, width, dtype=dtype), torch.ones(1, dtype=torch.int32)
    cache, scale = torch.zeros(1, 1, ROWS, width, dtype=dtype), torch.ones(1, 1, ROWS)
    cuda_decode.attention(run, q, cache, cache, lengths, scale=1.0)
    bytes_ = cache.to(torch.int8)
    cuda_decode.attention(run, q, bytes_, bytes_, lengths, scales=(scale, scale), scale=1.0)


def _pointwise(run: Run, dtype: torch.dtype) -> None:
    """RoPE and SwiGLU with its gradient."""
    x, angles = torch.zeros(ROWS, WIDTH, dtype=dtype), torch.ones(ROWS, 32)
    heads = x.view(ROWS, -1, 64)
    cuda_pointwise.rope(run, heads, heads, angles, angles)
    cuda_pointwise.swiglu(run, x, x)
    cuda_pointwise.swiglu_backward(run, x, x, x)


def _cross_entropy(run: Run, dtype: torch.dtype) -> None:
    """Take the largest row of logits that a block holds."""
    logits = torch.zeros(1, 1024 * 64 // dtype.itemsize, dtype=dtype)
    cuda_cross_entropy.cross_entropy(run, logits, torch.zeros(1, dtype=torch.int64))


def _adamw8bit(run: Run) -> None:
    """Make a step."""
    p, codes, scales = torch.zeros(512), torch.zeros(512, dtype=torch.uint8), torch.zeros(2)
    moments = Moments(m=codes, v=codes, m_scale=scales, v_scale=scales)
    rates = Rates(beta1=0.9, beta2=0.95, rate=0.1, inverse2=1.0, eps=1e-8, decay=1.0)
    cuda_adamw8bit.step(run, p, p, moments, rates)
