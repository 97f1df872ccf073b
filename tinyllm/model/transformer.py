"""The decoder-only transformer: embedding, pre-normalised blocks, final norm, head.

Only the model: no loss, no optimizer, no sampling. Module names are those of Hugging Face's Llama,
Qwen3 and DeepSeek-V3, so that weights need no renaming. Dimensions: B batch, T query positions,
S key positions, D width, K head width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm.model.attention import (
    Attention,
    LayerCache,
    causal_mask,
    document_mask,
    document_positions,
    is_lengths,
    window_mask,
)
from tinyllm.model.checkpointing import Checkpoint, run_block
from tinyllm.model.ffn import build_ffn
from tinyllm.model.mla import LatentAttention
from tinyllm.model.norm import build_norm
from tinyllm.model.rope import rope_tables, yarn_temperature
from tinyllm.model.sizes import ModelConfig
from tinyllm.ops.decoder import SequenceDecoder


class Cache(Protocol):
    """Keys and values of all layers for the positions already seen."""

    @property
    def layers(self) -> Sequence[LayerCache]:
        """One per block."""

    def plan(self, n_tokens: int) -> tuple[Tensor, Tensor | None]:
        """Return the positions of the next `n_tokens`, (T,) or (B, T), and the attention mask.

        The mask is one of those of `Attention.forward`.
        """


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)).

    Pre-normalisation: Xiong et al. 2020, arXiv:2002.04745, figure 1b.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        """Build block number `index`, from 0; it decides about the window."""
        super().__init__()
        window = config.window if index in config.window_layers else None
        self.input_layernorm = build_norm(config)
        self.self_attn = build_attention(config, window)
        self.post_attention_layernorm = build_norm(config)
        self.mlp = build_ffn(config)
        self.dropout = build_dropout(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        document_ids: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """Return the block's output, (B, T, D); arguments as in `Attention.forward`."""
        attended = self.self_attn(self.input_layernorm(x), cos, sin, mask, document_ids, cache)
        x = x + self.dropout(attended)
        out: Tensor = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
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
        self.cache_dtype: torch.dtype | None = None
        """What keys and values are kept as between tokens; None: what suits the weights."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d)
        self.embed_positions = None
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_seq_len, config.d)
        self.dropout = build_dropout(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = build_norm(config)
        self.lm_head = nn.Linear(config.d, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        cos, sin = rope_tables(
            config.max_seq_len, config.d_rope, config.rope_base, config.rope_scaling
        )
        # queries and keys are rotated whole, so the tables can carry YaRN's factor; where only a
        # part of them is (latent attention), the softmax scale carries it
        factor = yarn_temperature(config.rope_scaling) if config.mla is None else 1.0
        self.register_buffer("rope_cos", cos * factor, persistent=False)
        self.register_buffer("rope_sin", sin * factor, persistent=False)

    def forward(
        self, ids_BT: Tensor, *, document_ids: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Return the logits of every position, (B, T, V), in the dtype of the head.

        Args:
            ids_BT: token ids, int64.
            document_ids: (B, T) where several documents share a row: they do not see each other
                and each counts its positions from 0. Not together with a cache.
            cache: earlier positions; the new ones are appended to it.
        """
        return self.head(self.hidden(ids_BT, document_ids=document_ids, cache=cache))

    def hidden(
        self, ids_BT: Tensor, *, document_ids: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Return the normalised output of the last block, (B, T, D); arguments as in `forward`."""
        T = ids_BT.shape[1]
        mask: Tensor | None = None
        positions: Tensor | slice = slice(T)
        if cache is not None:
            positions, mask = cache.plan(T)
        elif document_ids is not None:
            positions = document_positions(document_ids)
            if not self.training:
                mask = document_mask(document_ids)
        cos, sin = self.rope_cos[positions], self.rope_sin[positions]
        x = self.embed_tokens(ids_BT)
        if self.embed_positions is not None:
            x = x + self.embed_positions.weight[positions]
        x = self.dropout(x)
        masks = self._masks(mask, T, learns=self.training and cache is None)
        for i, block in enumerate(self.layers):
            layer = cache.layers[i] if cache is not None else None
            x = run_block(block, self.checkpoint, x, cos, sin, masks[i], document_ids, layer)
        normed: Tensor = self.norm(x)
        return normed

    def next_logits(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the logits after each row's last token, (B, V); the other rows skip the head."""
        return self.head(self.hidden(ids_BT, cache=cache)[:, -1])

    def sequence_decoder(self, cache: Cache) -> SequenceDecoder | None:
        """Return native code that fills a sequence's cache; only a quantised model has it."""
        return None

    def _masks(self, mask: Tensor | None, n_tokens: int, *, learns: bool) -> list[Tensor | None]:
        """Return each block's mask: narrower for a block with a window.

        Without a mask one token needs none there either: attention cuts the keys instead. Nor do
        whole sequences in training, nor lengths: attention knows its window.
        """
        narrow = mask
        if mask is not None and is_lengths(mask):
            return [mask] * self.config.n_layers
        if self.config.window is not None and not learns and (mask is not None or n_tokens > 1):
            whole = causal_mask(n_tokens, self.rope_cos.device) if mask is None else mask
            narrow = window_mask(whole, self.config.window)
        windowed = self.config.window_layers
        return [narrow if i in windowed else mask for i in range(self.config.n_layers)]

    def head(self, x_BTD: Tensor) -> Tensor:
        """Return the logits of hidden states, (B, T, V)."""
        logits: Tensor = self.lm_head(x_BTD)
        return logits


def build_attention(config: ModelConfig, window: int | None) -> Attention | LatentAttention:
    """Return a block's attention; `window`: positions that a query sees, None for all."""
    if config.mla is None:
        return Attention(config, window)
    return LatentAttention(config, config.mla, window)


def build_dropout(config: ModelConfig) -> nn.Module:
    """Return the model's dropout; at 0 one that touches neither the values nor the generator."""
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the sum over positions of -ln p(target), a scalar in nats, computed in fp32.

    A target of -100 does not count. Targets are the inputs shifted by one: whoever cuts the batch
    does that, once.
    """
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="sum")
