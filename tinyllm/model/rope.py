"""Rotary position embedding: position t turns each pair of channels by an angle proportional to t.

Half-split pairs (i, i + K/2), as Llama and Qwen in `transformers`. Su et al. 2021,
arXiv:2104.09864, eq. 15.
Dimensions: B batch, T positions, H heads, K head width.
"""

import torch
from torch import Tensor


def rope_tables(max_seq_len: int, d_head: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of all angles, both (max_seq_len, K / 2) in fp32.

    The angles are computed in fp64: at position 4096 an fp32 product is already off by 2e-4 rad.
    """
    frequencies = base ** -(torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of every head.

    Args:
        x_BTHK: queries or keys.
        cos: cosines of the positions, (T, K / 2), or (B, T, K / 2) where rows have positions of
        their own.
        sin: sines, likewise.

    Returns:
        The turned x, (B, T, H, K), dtype kept.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # one angle for all heads
    first, second = x_BTHK.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_BTHK.dtype)
