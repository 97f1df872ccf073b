"""The decoder-only transformer: embedding, pre-normalised blocks, final norm, head.

Only the model: no loss, no optimizer, no sampling. Module names are those of Hugging Face's Llama
and Qwen3, so that weights need no renaming. Dimensions: B batch, T query positions, S key
positions, D width, K head width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm.model.attention import Attention, LayerCache, document_mask, document_positions
from tinyllm.model.checkpointing import Checkpoint, run_block
from tinyllm.model.ffn import SwiGLU
from tinyllm.model.norm import RMSNorm
from tinyllm.model.rope import rope_tables
from tinyllm.model.sizes import ModelConfig


class Cache(Protocol):
    """Keys and values of all layers for the positions already seen."""

    @property
    def layers(self) -> Sequence[LayerCache]:
        """One per block."""

    def plan(self, n_tokens: int) -> tuple[Tensor, Tensor | None]:
        """Return the positions of the next `n_tokens`, (T,) or (B, T), and the attention mask."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)).

    Pre-normalisation: Xiong et al. 2020, arXiv:2002.04745, figure 1b.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.d, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        """Return the block's output, (B, T, D); arguments as in `Attention.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Transformer(nn.Module):
    """Token ids in, logits out."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint: Checkpoint = "none"
        """What blocks keep for the backward pass; the rest is computed again."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d, config.norm_eps)
        self.lm_head = nn.Linear(config.d, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        cos, sin = rope_tables(config.max_seq_len, config.d_head, config.rope_base)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(
        self, ids_BT: Tensor, *, document_ids: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Return the logits of every position, (B, T, V), in the dtype of the head.

        Args:
            ids_BT: token ids, int64.
            document_ids: (B, T) where several documents share a row: they do not see each other
            and each counts its
                positions from 0. Not together with a cache.
            cache: earlier positions; the new ones are appended to it.
        """
        return self.head(self.hidden(ids_BT, document_ids=document_ids, cache=cache))

    def hidden(
        self, ids_BT: Tensor, *, document_ids: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Return the normalised output of the last block, (B, T, D); arguments as in `forward`."""
        mask = None
        if cache is not None:
            positions, mask = cache.plan(ids_BT.shape[1])
            cos, sin = self.rope_cos[positions], self.rope_sin[positions]
        elif document_ids is not None:
            mask, positions = document_mask(document_ids), document_positions(document_ids)
            cos, sin = self.rope_cos[positions], self.rope_sin[positions]
        else:
            cos, sin = self.rope_cos[: ids_BT.shape[1]], self.rope_sin[: ids_BT.shape[1]]
        x = self.embed_tokens(ids_BT)
        for i, block in enumerate(self.layers):
            layer = cache.layers[i] if cache is not None else None
            x = run_block(block, self.checkpoint, x, cos, sin, mask, layer)
        normed: Tensor = self.norm(x)
        return normed

    def head(self, x_BTD: Tensor) -> Tensor:
        """Return the logits of hidden states, (B, T, V)."""
        logits: Tensor = self.lm_head(x_BTD)
        return logits


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the sum over positions of -ln p(target), a scalar in nats, computed in fp32.

    A target of -100 does not count. Targets are the inputs shifted by one: whoever cuts the batch
    does that, once.
    """
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="sum")
