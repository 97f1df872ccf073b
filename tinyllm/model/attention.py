"""Causal grouped-query attention, with and without a cache of earlier keys and values.

Dimensions: B batch, T query positions, S key positions, D width, H query heads, G key-value heads,
K head width.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm.model.norm import RMSNorm
from tinyllm.model.sizes import ModelConfig
from tinyllm.ops import reference
from tinyllm.ops.attention import attention
from tinyllm.ops.block import decode_attention, is_alone, rope


class LayerCache(Protocol):
    """The keys and values of one layer's earlier positions."""

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all so far, both (B, G, S, ...).

        Keys and values may have different widths: `ModelConfig.cached` tells them. Latent attention
        stores its rotated shared key as a key and its latent as a value, of one head.
        """


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(K)) V per head; Vaswani et al. 2017, arXiv:1706.03762, eq. 1.

    H / G consecutive query heads share one key-value head (Ainslie et al. 2023, arXiv:2305.13245),
    mapped as Hugging Face maps them: heads [0, 1] use group 0, heads [2, 3] use group 1. G = 1 is
    multi-query attention (Shazeer 2019, arXiv:1911.02150), G = H plain multi-head attention.
    """

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = (
            config.n_heads,
            config.n_kv_heads,
            config.d_head,
        )
        self.window, self.rotates = window, config.positions == "rope"
        d_q, d_kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        self.q_proj = nn.Linear(config.d, d_q, bias=config.bias)
        self.k_proj = nn.Linear(config.d, d_kv, bias=config.bias)
        self.v_proj = nn.Linear(config.d, d_kv, bias=config.bias)
        self.o_proj = nn.Linear(d_q, config.d, bias=config.bias)
        self.q_norm = RMSNorm(config.d_head, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.d_head, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        document_ids: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """Return the attended values, (B, T, D).

        Args:
            x_BTD: normalised residual stream.
            cos: rotary cosines of the T positions.
            sin: rotary sines of the T positions.
            mask: True where a query may look at a key, broadcastable to (B, 1, T, S); None means
            causal with T = S, or one query that sees every key (of its window). In training
            without a cache there is none: our kernels know documents and windows themselves.
            int32, (B,): T = 1, and the cache returns its whole memory, of which so many positions
            are filled.
            document_ids: (B, T) in training, where several documents share a row.
            cache: where keys and values of earlier positions are kept; None means there are none.
        """
        B, T, _ = x_BTD.shape
        q = self.q_norm(self.q_proj(x_BTD).view(B, T, self.n_heads, self.d_head))
        k = self.k_norm(self.k_proj(x_BTD).view(B, T, self.n_kv_heads, self.d_head))
        v = self.v_proj(x_BTD).view(B, T, self.n_kv_heads, self.d_head).transpose(1, 2)
        if self.rotates:
            turn = rope if is_alone(x_BTD) else reference.rope
            q, k = turn(q, k, cos, sin)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        if mask is None and T == 1 and self.window is not None:
            k, v = k[:, :, -self.window :], v[:, :, -self.window :]
        if mask is not None and is_lengths(mask):
            y_BHK = decode_attention(
                q.squeeze(2), k, v, mask, window=self.window or 0, scale=self.d_head**-0.5
            )
            y_BHTK = y_BHK.unsqueeze(2)
        elif self.training and cache is None:
            y_BHTK = attention(q, k, v, document_ids=document_ids, window=self.window or 0)
        else:
            y_BHTK = attend(q, k, v, mask)
        out: Tensor = self.o_proj(y_BHTK.transpose(1, 2).reshape(B, T, -1))
        return out


def attend(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    mask: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(scale Q K^T) V of every head, (B, H, T, width of v), by torch's operators.

    Args:
        q_BHTK: queries.
        k_BGSK: keys; consecutive H / G query heads share one.
        v_BGSK: values, of any width.
        mask: as in `Attention.forward`, or numbers that are added to the scores.
        scale: of the scores; None: 1 / sqrt(K).
    """
    if mask is not None and mask.is_floating_point():
        return attend_with_bias(q_BHTK, k_BGSK, v_BGSK, mask, scale or q_BHTK.shape[-1] ** -0.5)
    return F.scaled_dot_product_attention(
        q_BHTK,
        k_BGSK,
        v_BGSK,
        attn_mask=mask,
        is_causal=mask is None and q_BHTK.shape[2] > 1,
        scale=scale,
        enable_gqa=k_BGSK.shape[1] != q_BHTK.shape[1],
    )


def attend_with_bias(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias_TS: Tensor, scale: float
) -> Tensor:
    """Return softmax(scale Q K^T + bias) V, (B, H, T, width of v), in the plainest operators.

    For graphs of fixed shapes: the queries of the heads that share a key become rows of one matrix
    product, so keys are never repeated, and no tensor has more than four dimensions.
    """
    B, H, T, _ = q_BHTK.shape
    G = k_BGSK.shape[1]
    scores = (q_BHTK * scale).reshape(B, G, H // G * T, -1) @ k_BGSK.mT
    shares = (scores.view(B, H, T, -1) + bias_TS).softmax(dim=-1)
    y_BHTV: Tensor = (shares.view(B, G, H // G * T, -1) @ v_BGSK).view(B, H, T, -1)
    return y_BHTV


def is_lengths(mask: Tensor) -> bool:
    """Whether a mask tells how much of a cache is filled: a number, which a graph may replay."""
    return mask.dtype == torch.int32


def causal_mask(n_tokens: int, device: torch.device) -> Tensor:
    """Return (T, T) booleans, True where the query (row) may look at the key (column)."""
    return torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=device).tril()


def window_mask(mask: Tensor, window: int) -> Tensor:
    """Return the mask that leaves each query only the last `window` of the keys that it sees.

    Counted from the right among the visible keys, so it holds for any layout of a cache: padding
    and other documents take no place. Beltagy et al. 2020, arXiv:2004.05150, section 3.1.

    >>> window_mask(torch.tensor([[False, True, True, True]]), 2).tolist()
    [[False, False, True, True]]
    """
    from_the_right = mask.flip(-1).long().cumsum(-1).flip(-1)
    return mask & (from_the_right <= window)


def document_mask(document_ids: Tensor) -> Tensor:
    """Return the causal mask that keeps packed documents apart.

    Args:
        document_ids: (B, T) integers, equal within a document.

    Returns:
        (B, 1, T, T) booleans, True where the query (row) may look at the key (column).
    """
    T = document_ids.shape[1]
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return (same & causal_mask(T, document_ids.device))[:, None]


def document_positions(document_ids: Tensor) -> Tensor:
    """Return each token's position in its document, (B, T); [7, 7, 9, 9] gives [0, 1, 0, 1]."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values
