"""Every operation in plain torch: the definition of what the other backends compute.

INT8 operations equal it to the last bit, attention and cross-entropy but for rounding.
Not fast. Dimensions: M rows, N outputs, K inputs; for attention B batch, T positions, H query
heads, G key-value heads, K width of queries and keys, E width of values.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllm.ops.int4 import GROUP, unpack

MAX_K = 65536
"""Most inputs of a linear layer: K * 255 * 127 < 2^31 keeps every int32 sum from overflowing."""
HADAMARD = 32
"""Numbers that `hadamard` mixes: as many as a thread of the native decoder has at hand."""
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


def hadamard(x: Tensor) -> Tensor:
    """Rotate each `HADAMARD` neighbours of the last dimension; a shorter last block stays.

    The Walsh-Hadamard matrix over sqrt(HADAMARD) is orthogonal and its own inverse: applied to the
    inputs and to the rows of a weight, it changes no product. But a large number among small ones
    becomes many of middle size, which INT8 holds better (QuaRot, arXiv:2404.00456, section 4.1).

    Args:
        x: (..., K), floating point.
    """
    n = x.shape[-1] // HADAMARD * HADAMARD
    matrix = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    while matrix.shape[0] < HADAMARD:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    blocks = x[..., :n].reshape(*x.shape[:-1], n // HADAMARD, HADAMARD)
    rotated = blocks @ (matrix / math.sqrt(HADAMARD))
    return torch.cat((rotated.flatten(-2), x[..., n:]), dim=-1)


def bind_linear_w8a8(weight_q: Tensor, weight_scale: Tensor) -> Callable[[Tensor], Tensor]:
    """Return x -> y = (sum_k q_x q_w) * scale_x * scale_w, multiplied in fp32 from left to right.

    The sum is taken in fp64, where it is exact (below 2^53) in any order.

    Args:
        weight_q: (N, K), int8.
        weight_scale: (N,), fp32.
    """
    weight_KN = weight_q.double().T

    def linear(x: Tensor) -> Tensor:
        """Return (..., N) in x's dtype of x (..., K)."""
        q, scale = quantize_per_row(x)
        sums = (q.double() @ weight_KN).to(torch.int32)
        return (sums.float() * scale[..., None] * weight_scale).to(x.dtype)

    return linear


def bind_linear_w4a8(weight_q: Tensor, weight_scale: Tensor) -> Callable[[Tensor], Tensor]:
    """Return x -> y = (sum_g (sum_{k in g} q_x q_w) * scale_w[g]) * scale_x.

    Sums within a group g of 32 inputs are whole numbers below 2^24, so exact in fp32; those over
    groups are taken in fp32 in rising order, product and sum rounded one after the other.

    Args:
        weight_q: (N, K / 2), uint8 as in `tinyllm.ops.int4`.
        weight_scale: (N, ceil(K / 32)), bf16.
    """
    groups_KN = torch.split(unpack(weight_q).float().T, GROUP)
    scales_GN = weight_scale.float().T

    def linear(x: Tensor) -> Tensor:
        """Return (..., N) in x's dtype of x (..., K)."""
        q, scale = quantize_per_row(x)
        y = torch.zeros(*x.shape[:-1], weight_q.shape[0], device=x.device)
        parts = torch.split(q.float(), GROUP, dim=-1)
        for part, group_KN, scale_N in zip(parts, groups_KN, scales_GN, strict=True):
            y = y + (part @ group_KN) * scale_N
        return (y * scale[..., None]).to(x.dtype)

    return linear


def visible(
    n_tokens: int, document_ids: Tensor | None, window: int, device: torch.device
) -> Tensor:
    """Return which keys (columns) a query (row) sees, (T, T) or (B, 1, T, T) booleans.

    Args:
        n_tokens: T.
        document_ids: (B, T) integers, positions see only their own document; or None.
        window: a query sees its own position and window - 1 before it; 0: all.
        device: where the result lies.
    """
    position = torch.arange(n_tokens, device=device)
    distance = position[:, None] - position
    mask = distance >= 0
    if window:
        mask = mask & (distance < window)
    if document_ids is not None:
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    return mask


def attention(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTE: Tensor,
    document_ids: Tensor | None,
    window: int,
    scale: float,
) -> Tensor:
    """Return softmax(scale Q K^T) V per head, causal, (B, H, T, E), in the inputs' format.

    Vaswani et al. 2017, arXiv:1706.03762, eq. 1. Query head h reads key-value head h // (H / G).

    Args:
        q_BHTK: queries.
        k_BGTK: keys.
        v_BGTE: values.
        document_ids: as in `visible`.
        window: as in `visible`.
        scale: of the scores.
    """
    shared = q_BHTK.shape[1] // k_BGTK.shape[1]
    k, v = (x.repeat_interleave(shared, dim=1) for x in (k_BGTK, v_BGTE))
    scores = (q_BHTK @ k.mT) * scale
    mask = visible(q_BHTK.shape[2], document_ids, window, q_BHTK.device)
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ v


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps), (..., D) in x's format, computed in fp32.

    Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    return F.rms_norm(x.float(), weight_D.shape, weight_D.float(), eps).to(x.dtype)


def rope(q_BTHK: Tensor, k_BTGK: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys turned as in `turn`."""
    return turn(q_BTHK, cos, sin), turn(k_BTGK, cos, sin)


def turn(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + K/2) of every head; Su et al. 2021, arXiv:2104.09864, eq. 15.

    Args:
        x_BTHK: queries or keys.
        cos: cosines of the positions, (T, K / 2), or (B, T, K / 2) where rows have positions of
            their own; fp32.
        sin: sines, likewise.

    Returns:
        The turned x, dtype kept.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # one angle for all heads
    first, second = x_BTHK.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_BTHK.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up; Shazeer 2020, arXiv:2002.05202, eq. 6."""
    return F.silu(gate) * up


def decode_attention(
    q_BHK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, lengths_B: Tensor, window: int, scale: float
) -> Tensor:
    """Return softmax(scale q K^T) V over each sequence's own length, (B, H, K).

    Args:
        q_BHK: one query per head; head h reads key-value head h // (H / G).
        k_BGSK: a cache's whole memory, S positions.
        v_BGSK: likewise.
        lengths_B: positions that count, the new one among them; integers from 1.
        window: the last so many of them only; 0: all.
        scale: of the scores.
    """
    seen = cache_mask(lengths_B, k_BGSK.shape[2], window)
    shared = q_BHK.shape[1] // k_BGSK.shape[1]
    k, v = (x.repeat_interleave(shared, dim=1) for x in (k_BGSK, v_BGSK))
    scores = (q_BHK.unsqueeze(2) @ k.mT) * scale
    return (scores.masked_fill(~seen[:, None, None], -math.inf).softmax(-1) @ v).squeeze(2)


def cache_mask(lengths_B: Tensor, n_positions: int, window: int) -> Tensor:
    """Return which positions of a cache's whole memory count, (B, S) booleans.

    Args:
        lengths_B: as in `decode_attention`.
        n_positions: S.
        window: as in `decode_attention`.
    """
    behind = lengths_B[:, None] - torch.arange(n_positions, device=lengths_B.device)
    return (behind > 0) & (behind <= window) if window else behind > 0


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return -ln softmax(logits)[target] per row, and its gradient softmax - one hot.

    Bishop 2006, eq. 4.109. Computed in fp32 or wider.

    Args:
        logits_NV: (N, V), floating point.
        targets_N: (N,), int64, below V; a row with a negative one has loss 0 and gradient 0.

    Returns:
        Losses (N,) in fp32 or wider, the gradient (N, V) in the format of the logits.
    """
    counts, index = targets_N[:, None] >= 0, targets_N[:, None].clamp(min=0)
    logits = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    log_sum = logits.logsumexp(-1, keepdim=True)
    loss = torch.where(counts, log_sum - logits.gather(1, index), 0)
    softmax = (logits - log_sum).exp_()
    softmax.scatter_(1, index, softmax.gather(1, index) - 1)
    return loss.squeeze(1), softmax.mul_(counts).to(logits_NV.dtype)
