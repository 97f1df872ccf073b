"""A quantised transformer that fills a cache in one native call, where machine and sizes allow.

Everything else (no cache, another device, latent attention) runs layer by layer, as in
`tinyllm.model.transformer.Transformer`. Both ways do the same arithmetic; sums of floats are taken
in another order, so outputs agree to fp32 rounding and now and then one INT8 step of an activation.
Dimensions: B sequences, T new tokens, D width, V vocabulary.
"""

from typing import cast

import torch
from torch import Tensor, nn

from tinyllm.model.attention import Attention
from tinyllm.model.ffn import SwiGLU
from tinyllm.model.norm import RMSNorm
from tinyllm.model.transformer import Block, Cache, Transformer
from tinyllm.ops.decoder import Decoder, DecoderWeights, LayerWeights, SequenceDecoder
from tinyllm.ops.registry import select
from tinyllm.ops.room import CACHED, RoomyCache
from tinyllm.quantization.layers import Int8Embedding, Prepared, QuantizedLinear

NOT_HERE = "layer by layer"


class QuantizedTransformer(Prepared, Transformer):
    """A `Transformer` whose matrices are INT8, those of the blocks perhaps of 4 bits."""

    def __init__(self, model: Transformer) -> None:
        """Take over the parts of a model."""
        nn.Module.__init__(self)  # the parts exist already
        self.__dict__.update(model.__dict__)

    def hidden(
        self, ids_BT: Tensor, *, document_ids: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Return what `Transformer.hidden` does, (B, T, D)."""
        decoder = self._decoder(cache)
        if decoder is None:
            return super().hidden(ids_BT, document_ids=document_ids, cache=cache)
        return decoder.hidden(ids_BT, cast(RoomyCache, cache).make_room(ids_BT.shape[1]))

    def next_logits(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Return what `Transformer.next_logits` does, (B, V)."""
        decoder = self._decoder(cache)
        if decoder is None:
            return super().next_logits(ids_BT, cache)
        return decoder.logits(ids_BT, cast(RoomyCache, cache).make_room(ids_BT.shape[1]))

    def sequence_decoder(self, cache: Cache) -> SequenceDecoder | None:
        """Return what fills the cache of one sequence, None where it is done layer by layer."""
        decoder = self._decoder(cache)
        if decoder is None:
            return None
        return decoder.for_sequence(cast(RoomyCache, cache).make_room(0))

    def _decoder(self, cache: Cache | None) -> Decoder | None:
        """Return what fills a cache in one call, None where it is done layer by layer."""
        if not isinstance(cache, RoomyCache) or cache.dtype not in CACHED:
            return None
        if self.rope_cos.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return None
        if self._prepared is None:
            made = None
            if is_standard(self):
                weights = decoder_weights(self)
                made = select("decoder", weights.head[0]).function(weights)
            self._prepared = NOT_HERE if made is None else made
        return self._prepared if isinstance(self._prepared, Decoder) else None


def is_standard(model: Transformer) -> bool:
    """Whether a model is of the kind that `Decoder` knows: matrices quantised, the rest fp32."""
    return (
        isinstance(model.embed_tokens, Int8Embedding)
        and _bits(model.lm_head) == 8
        and len({x.activation_bits for x in model.modules() if isinstance(x, QuantizedLinear)}) == 1
        and isinstance(model.norm, RMSNorm)
        and model.embed_positions is None
        and model.embed_tokens.weight_scale.dtype is torch.float32
        and all(isinstance(block, Block) and _is_standard(block) for block in model.layers)
    )


def _is_standard(block: Block) -> bool:
    """Whether a block is of that kind."""
    attention, mlp = block.self_attn, block.mlp
    if not (isinstance(attention, Attention) and isinstance(mlp, SwiGLU)):
        return False
    layers = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    layers += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return (
        {_bits(layer) for layer in layers} in ({8}, {4})
        and attention.rotates
        and isinstance(block.input_layernorm, RMSNorm)
    )


def _bits(layer: nn.Module) -> int | None:
    """Return the bits of a quantised layer's weights, None for one in floating point."""
    return layer.bits if isinstance(layer, QuantizedLinear) else None


def decoder_weights(model: Transformer) -> DecoderWeights:
    """Return a standard model's weights, those that read the same input joined."""
    config = model.config
    return DecoderWeights(
        layers=[_layer_weights(cast(Block, block)) for block in model.layers],
        embedding=_rows(model.embed_tokens),
        head=_rows(model.lm_head),
        norm=cast(Tensor, model.norm.weight),
        cosines=model.rope_cos,
        sines=model.rope_sin,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        d_head=config.d_head,
        eps=config.norm_eps,
        activation_bits=cast(QuantizedLinear, model.lm_head).activation_bits,
    )


def _layer_weights(block: Block) -> LayerWeights:
    """Return one block's weights."""
    attention, mlp = cast(Attention, block.self_attn), cast(SwiGLU, block.mlp)
    q_norm, k_norm = attention.q_norm, attention.k_norm
    return LayerWeights(
        qkv=_rows(attention.q_proj, attention.k_proj, attention.v_proj),
        o=_rows(attention.o_proj),
        gate=_rows(mlp.gate_proj),
        up=_rows(mlp.up_proj),
        down=_rows(mlp.down_proj),
        norm_attention=block.input_layernorm.weight,
        norm_mlp=block.post_attention_layernorm.weight,
        norm_q=q_norm.weight if isinstance(q_norm, RMSNorm) else None,
        norm_k=k_norm.weight if isinstance(k_norm, RMSNorm) else None,
        window=attention.window or 0,
    )


def _rows(*layers: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the weights of quantised layers one below the other, with their scales."""
    parts = [layer.get_buffer("weight_q") for layer in layers]
    scales = [layer.get_buffer("weight_scale") for layer in layers]
    return (parts[0], scales[0]) if len(parts) == 1 else (torch.cat(parts), torch.cat(scales))
