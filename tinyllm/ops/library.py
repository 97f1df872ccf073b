"""Backend `torch`: library calls, with what is ours around them.

`torch._int_mm` multiplies INT8 matrices into INT32. Dimensions: M rows, N outputs, K inputs; those
of attention as in `reference`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllm.ops.reference import cache_mask, quantize_per_row, visible

CUDA_MIN_ROWS = 17
"""On CUDA `_int_mm` wants more than 16 rows, and K and N divisible by 8."""


def refuses_linear_w8a8(weight_q: Tensor) -> str | None:
    """Return why `_int_mm` cannot take this weight, None if it can."""
    if weight_q.is_cuda and (weight_q.shape[0] % 8 or weight_q.shape[1] % 8):
        return "_int_mm on CUDA wants K and N divisible by 8"
    return None


def bind_linear_w8a8(weight_q: Tensor, weight_scale: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the linear layer of `reference.bind_linear_w8a8`, computed by `torch._int_mm`."""
    weight_KN = weight_q.T
    n, k = weight_q.shape

    def linear(x: Tensor) -> Tensor:
        """Return (..., N) in x's dtype of x (..., K)."""
        q, scale = quantize_per_row(x.reshape(-1, k))
        m = q.shape[0]
        if x.is_cuda and m < CUDA_MIN_ROWS:
            q = F.pad(q, (0, 0, 0, CUDA_MIN_ROWS - m))
        y = torch._int_mm(q, weight_KN)[:m].float()
        y.mul_(scale[:, None]).mul_(weight_scale)
        return y.view(*x.shape[:-1], n).to(x.dtype)

    return linear


def attention(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTE: Tensor,
    document_ids: Tensor | None,
    window: int,
    scale: float,
) -> Tensor:
    """Do what `reference.attention` does, by torch's fused attention."""
    plain = document_ids is None and not window
    mask = None if plain else visible(q_BHTK.shape[2], document_ids, window, q_BHTK.device)
    y: Tensor = F.scaled_dot_product_attention(
        q_BHTK,
        k_BGTK,
        v_BGTE,
        attn_mask=mask,
        is_causal=plain,
        scale=scale,
        enable_gqa=q_BHTK.shape[1] != k_BGTK.shape[1],
    )
    return y


def decode_attention(
    q_BHK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, lengths_B: Tensor, window: int, scale: float
) -> Tensor:
    """Do what `reference.decode_attention` does, by torch's fused attention behind a mask."""
    y: Tensor = F.scaled_dot_product_attention(
        q_BHK.unsqueeze(2),
        k_BGSK,
        v_BGSK,
        attn_mask=cache_mask(lengths_B, k_BGSK.shape[2], window)[:, None, None],
        scale=scale,
        enable_gqa=q_BHK.shape[1] != k_BGSK.shape[1],
    )
    return y.squeeze(2)
