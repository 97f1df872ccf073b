"""Numbers of 4 bits in groups of 32, two in a byte: the format that 4-bit weights are stored in.

A group is 32 neighbouring inputs of one output and has one scale in bf16: w is about q scale with
q in [-8, 7], stored as q + 8, the first of two inputs in the low half of its byte. That is 4.5 bits
per weight. Dimensions: N outputs, K inputs (even), G = ceil(K / 32) groups.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 32
"""Inputs that share a scale."""
LOWEST, HIGHEST = -8, 7
"""The range of 4 bits, all of it."""


def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix in 4 bits: the number of largest magnitude of each group becomes -8.

    scale = w_max / -8 with w_max the signed number of largest magnitude, rounded to bf16;
    q = round(w / scale), halves to even, clamped to [-8, 7]. A group of zeros has scale 0, one with
    NaN or infinity has such a scale. Scales that minimise the squared error gain 0.5 dB and gave a
    worse val_bpb (docs/int4.md).

    Args:
        weight: (N, K), floating point.

    Returns:
        Packed numbers (N, K / 2), uint8, and scales (N, G), bf16.

    Raises:
        ValueError: K is odd.
    """
    n, k = weight.shape
    if k % 2:
        raise ValueError(f"4-bit weights want an even number of inputs, got {k}")
    groups = F.pad(weight.float(), (0, -k % GROUP)).view(n, -1, GROUP)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (largest / LOWEST).bfloat16()
    # Zero by zero is NaN and counts as zero.
    q = (groups / scale.float()).round().nan_to_num(0.0).clamp(LOWEST, HIGHEST)
    return pack(q.view(n, -1)[:, :k].to(torch.int8)), scale.squeeze(-1)


def pack(q_NK: Tensor) -> Tensor:
    """Return numbers in [-8, 7] two in a byte, (N, K / 2); `[[-8, 7]]` becomes `[[0xf0]]`."""
    stored = (q_NK - LOWEST).to(torch.uint8)
    return stored[:, ::2] | stored[:, 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """Return the numbers of packed rows, (N, K), int8."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1).to(torch.int8) + LOWEST


def dequantize_groups(packed: Tensor, scale: Tensor) -> Tensor:
    """Return what packed rows (N, K / 2) with scales (N, G) stand for, (N, K), fp32."""
    q = unpack(packed)
    return q * scale.float().repeat_interleave(GROUP, dim=1)[:, : q.shape[1]]
