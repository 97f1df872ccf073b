"""Rotary position embedding: position t turns each pair of channels by an angle proportional to t.

Half-split pairs (i, i + K/2), as Llama and Qwen in `transformers`. Su et al. 2021,
arXiv:2104.09864, eq. 15.
Dimensions: B batch, T positions, H heads, K rotated width of a head.
"""

import math

import torch
from torch import Tensor

from tinyllm.model.sizes import RopeScaling
from tinyllm.ops.reference import turn

YARN_FAST, YARN_SLOW = 32, 1
"""Turns within the original context: pairs with more stay, pairs with fewer are slowed down fully;
arXiv:2309.00071, section 3.2 (beta and alpha)."""


def rope_tables(
    max_seq_len: int, d_head: int, base: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of all angles, both (max_seq_len, K / 2) in fp32.

    The angles are computed in fp64: at position 4096 an fp32 product is already off by 2e-4 rad.
    """
    frequencies = base ** -(torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor  # Chen et al. 2023, arXiv:2306.15595, eq. 4
    elif scaling is not None and scaling.kind == "yarn":
        slowed = _share_slowed(d_head, base, scaling)
        frequencies = frequencies * (1 - slowed) + frequencies / scaling.factor * slowed
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def yarn_temperature(scaling: RopeScaling) -> float:
    """Return what YaRN multiplies queries and keys by, each; 1.0 without YaRN.

    0.1 ln(factor) + 1; arXiv:2309.00071, eq. 22: more keys, so softmax is made sharper.
    """
    return 0.1 * math.log(scaling.factor) + 1 if scaling.kind == "yarn" else 1.0


def apply_rope(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x with the pairs of every head turned, dtype kept; `ops.reference.turn` tells how."""
    return turn(x_BTHK, cos, sin)


def _share_slowed(d_head: int, base: float, scaling: RopeScaling) -> Tensor:
    """Return per pair how far it is slowed down, from 0 (fast pairs) to 1, (K / 2,) in fp64.

    A ramp over the index of the pair between those that make `YARN_FAST` and `YARN_SLOW` turns;
    arXiv:2309.00071, eqs. 17-18, its ends rounded outwards as in `transformers`.
    """
    assert scaling.original_len is not None  # resolved

    def pair_with(turns: float) -> float:
        """Return the index of the pair that makes so many turns within the trained context."""
        wavelength = scaling.original_len / (turns * 2 * math.pi)  # type: ignore[operator]
        return d_head * math.log(wavelength) / (2 * math.log(base))

    low = max(math.floor(pair_with(YARN_FAST)), 0)
    high = min(math.ceil(pair_with(YARN_SLOW)), d_head - 1)
    index = torch.arange(d_head // 2, dtype=torch.float64)
    return ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
