"""Multi-head latent attention: keys and values of all heads are made from one small latent.

DeepSeek-V3, arXiv:2412.19437, section 2.1.1; names as in Hugging Face's DeepseekV3ForCausalLM. Each
query and key has a part without a position, a head's own, and a rotated part, whose key all heads
share. The cache holds the normed latent and the rotated shared key, nothing per head.

Two ways to compute the same:

    naive      K_h = W_k,h c, V_h = W_v,h c for every cached c, then plain attention
    absorbed   q_h^T (W_k,h c) = (W_k,h^T q_h)^T c: the query moves into the latent's space, attends
               to the latents themselves as all heads' keys and values, and only its result is
               brought back by W_v,h. A step costs R + dr per cached position and head, and
               no position is ever expanded.

Dimensions: B batch, T query positions, S key positions, D width, H heads, R latent width,
N and E widths of a head without and with position, V width of a value head.
"""

import torch
from torch import Tensor, nn

from tinyllm.model.attention import LayerCache, attend, causal_mask, is_lengths
from tinyllm.model.norm import RMSNorm
from tinyllm.model.rope import apply_rope, yarn_temperature
from tinyllm.model.sizes import MlaSizes, ModelConfig
from tinyllm.ops.attention import attention
from tinyllm.ops.reference import cache_mask

LATENT_EPS = 1e-6
"""Of the norms of the latents, whatever `norm_eps` is: DeepSeek's code fixes it."""


class LatentAttention(nn.Module):
    """Stands in for `Attention`; its cache takes the shared key as key, the latent as value."""

    def __init__(self, config: ModelConfig, sizes: MlaSizes, window: int | None) -> None:
        super().__init__()
        self.sizes, self.n_heads, self.window = sizes, config.n_heads, window
        self.absorbs = True
        """Whether steps with a cache are absorbed; False: naive, to compare."""
        d_q = config.n_heads * (sizes.d_nope + sizes.d_rope)
        if sizes.q_rank is None:
            self.q_proj = nn.Linear(config.d, d_q, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.d, sizes.q_rank, bias=False)
            self.q_a_layernorm = RMSNorm(sizes.q_rank, LATENT_EPS)
            self.q_b_proj = nn.Linear(sizes.q_rank, d_q, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.d, sizes.kv_rank + sizes.d_rope, bias=False)
        self.kv_a_layernorm = RMSNorm(sizes.kv_rank, LATENT_EPS)
        d_kv = config.n_heads * (sizes.d_nope + sizes.d_v)
        self.kv_b_proj = nn.Linear(sizes.kv_rank, d_kv, bias=False)
        self.o_proj = nn.Linear(config.n_heads * sizes.d_v, config.d, bias=False)
        # YaRN sharpens all of a score, its unrotated part too: the square of the factor of q and k
        factor = yarn_temperature(config.rope_scaling) ** 2
        self.scale = factor * (sizes.d_nope + sizes.d_rope) ** -0.5

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        document_ids: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """Return the attended values, (B, T, D); arguments as in `Attention.forward`."""
        B, T, _ = x_BTD.shape
        q_BTHQ = self._queries(x_BTD).view(B, T, self.n_heads, -1)
        q_nope, q_rope = torch.split(q_BTHQ, [self.sizes.d_nope, self.sizes.d_rope], dim=-1)
        latent, key = torch.split(
            self.kv_a_proj_with_mqa(x_BTD), [self.sizes.kv_rank, self.sizes.d_rope], dim=-1
        )
        latent = self.kv_a_layernorm(latent)[:, None]  # (B, 1, T, R): one head
        q_nope = q_nope.transpose(1, 2)
        q_rope = apply_rope(q_rope, cos, sin).transpose(1, 2)
        key = apply_rope(key[:, :, None], cos, sin).transpose(1, 2)  # (B, 1, T, E)
        if cache is not None:
            key, latent = cache.append(key, latent)
        if mask is not None and is_lengths(mask):
            mask = cache_mask(mask, key.shape[2], self.window or 0)[:, None, None]
        if mask is None and T == 1 and self.window is not None:
            key, latent = key[:, :, -self.window :], latent[:, :, -self.window :]
        # what stands in for a plain layer (LoRA) has no one matrix that could be absorbed
        absorb = cache is not None and self.absorbs and type(self.kv_b_proj) is nn.Linear
        if absorb:
            y_BHTV = self._absorbed(q_nope, q_rope, latent, key, mask)
        else:
            k, v = self._expand(latent, key)
            q = torch.cat((q_nope, q_rope), dim=-1)
            if self.training and cache is None:
                y_BHTV = attention(
                    q, k, v, document_ids=document_ids, window=self.window or 0, scale=self.scale
                )
            else:
                y_BHTV = attend(q, k, v, mask, self.scale)
        out: Tensor = self.o_proj(y_BHTV.transpose(1, 2).reshape(B, T, -1))
        return out

    def _queries(self, x_BTD: Tensor) -> Tensor:
        """Return the queries of all heads, (B, T, H (N + E))."""
        q: Tensor
        if self.sizes.q_rank is None:
            q = self.q_proj(x_BTD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        return q

    def _expand(self, latent: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return all heads' keys and values of the latents, (B, H, S, ...)."""
        B, _, S, _ = latent.shape
        expanded = self.kv_b_proj(latent[:, 0]).view(B, S, self.n_heads, -1).transpose(1, 2)
        k_nope, v = torch.split(expanded, [self.sizes.d_nope, self.sizes.d_v], dim=-1)
        return torch.cat((k_nope, key.expand(-1, self.n_heads, -1, -1)), dim=-1), v

    def _absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, key: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attend to the latents themselves; (B, H, T, V).

        All heads read the same keys, so their queries are rows of one matrix product.
        """
        B, H, T, _ = q_nope.shape
        latent, key = latent[:, 0], key[:, 0]  # (B, S, R), (B, S, E)
        w_HXR = self.kv_b_proj.weight.view(H, -1, self.sizes.kv_rank)
        w_k, w_v = torch.split(w_HXR, [self.sizes.d_nope, self.sizes.d_v], dim=1)
        q_latent = q_nope @ w_k
        scores = q_latent.flatten(1, 2) @ latent.mT + q_rope.flatten(1, 2) @ key.mT
        scores = scores.view(B, H, T, -1).float() * self.scale
        if mask is None and T > 1:
            mask = causal_mask(T, scores.device)
        if mask is not None and mask.is_floating_point():
            scores = scores + mask
        elif mask is not None:  # not -inf: a row of padding sees nothing, and must not become NaN
            scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
        shares = scores.softmax(dim=-1).to(latent.dtype)
        seen_BHTR = (shares.flatten(1, 2) @ latent).view(B, H, T, -1)
        y_BHTV: Tensor = seen_BHTR @ w_v.mT
        return y_BHTV
