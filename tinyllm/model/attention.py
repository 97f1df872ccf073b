"""Causal grouped-query attention, with and without a cache of earlier keys and values.

Dimensions: B batch, T query positions, S key positions, D width, H query heads, G key-value heads,
K head width.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm.model.norm import RMSNorm
from tinyllm.model.rope import apply_rope
from tinyllm.model.sizes import ModelConfig
from tinyllm.ops.attention import attention


class LayerCache(Protocol):
    """The keys and values of one layer's earlier positions."""

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all so far, both (B, G, S, K)."""


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(K)) V per head; Vaswani et al. 2017, arXiv:1706.03762, eq. 1.

    H / G consecutive query heads share one key-value head (Ainslie et al. 2023, arXiv:2305.13245),
    mapped as Hugging Face maps them: heads [0, 1] use group 0, heads [2, 3] use group 1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = (
            config.n_heads,
            config.n_kv_heads,
            config.d_head,
        )
        self.q_proj = nn.Linear(config.d, config.n_heads * config.d_head, bias=False)
        self.k_proj = nn.Linear(config.d, config.n_kv_heads * config.d_head, bias=False)
        self.v_proj = nn.Linear(config.d, config.n_kv_heads * config.d_head, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.d_head, config.d, bias=False)
        self.q_norm = RMSNorm(config.d_head, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.d_head, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        """Return the attended values, (B, T, D).

        Args:
            x_BTD: normalised residual stream.
            cos: rotary cosines of the T positions.
            sin: rotary sines of the T positions.
            mask: True where a query may look at a key, broadcastable to (B, 1, T, S); None means
            causal with T = S, or one query that sees every key.
            cache: where keys and values of earlier positions are kept; None means there are none.
        """
        B, T, _ = x_BTD.shape
        q = self.q_norm(self.q_proj(x_BTD).view(B, T, self.n_heads, self.d_head))
        k = self.k_norm(self.k_proj(x_BTD).view(B, T, self.n_kv_heads, self.d_head))
        v = self.v_proj(x_BTD).view(B, T, self.n_kv_heads, self.d_head).transpose(1, 2)
        q = apply_rope(q, cos, sin).transpose(1, 2)
        k = apply_rope(k, cos, sin).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        if self.training and mask is None and cache is None:
            y_BHTK = attention(q, k, v)
        else:  # evaluation, too: exported graphs must hold torch's operators alone
            y_BHTK = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None and T > 1,
                enable_gqa=self.n_kv_heads != self.n_heads,
            )
        out: Tensor = self.o_proj(y_BHTK.transpose(1, 2).reshape(B, T, -1))
        return out


def document_mask(document_ids: Tensor) -> Tensor:
    """Return the causal mask that keeps packed documents apart.

    Args:
        document_ids: (B, T) integers, equal within a document.

    Returns:
        (B, 1, T, T) booleans, True where the query (row) may look at the key (column).
    """
    T = document_ids.shape[1]
    same = document_ids[:, :, None] == document_ids[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=document_ids.device).tril()
    return (same & causal)[:, None]


def document_positions(document_ids: Tensor) -> Tensor:
    """Return each token's position in its document, (B, T); [7, 7, 9, 9] gives [0, 1, 0, 1]."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values
