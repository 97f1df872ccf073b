"""A transformer block of INT8 layers that decodes one token as a whole, where the machine can.

Everything else (a prompt, a batch, another device or dtype) runs layer by layer, as in
`tinyllm.model.transformer.Block`. Both ways do the same arithmetic; sums of floats are taken in
another order, so outputs agree to fp32 rounding and now and then one INT8 step of an activation.
"""

import torch
from torch import Tensor, nn

from tinyllm.model.attention import Attention, LayerCache
from tinyllm.model.ffn import SwiGLU
from tinyllm.model.norm import RMSNorm
from tinyllm.model.transformer import Block
from tinyllm.ops.decode import BlockWeights, DecodeBlock
from tinyllm.ops.registry import select
from tinyllm.quantization.layers import Prepared

NOT_HERE = "layer by layer"


class Int8Block(Prepared, Block):
    """A `Block` whose linear layers are `Int8Linear`."""

    def __init__(self, block: Block) -> None:
        """Take over the parts of a block."""
        nn.Module.__init__(self)  # the parts exist already
        self.training = block.training
        for name, part in block.named_children():
            self.add_module(name, part)

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
        if cache is not None and mask is None and _is_one_token(x):
            decode = self._decode_block()
            if decode is not None:
                qkv, k, v = decode.project(x, cos, sin)
                return decode.finish(x, qkv, *cache.append(k, v))
        return super().forward(x, cos, sin, mask, document_ids, cache)

    def _decode_block(self) -> DecodeBlock | None:
        """Return the whole block for decoding, None where it has to go layer by layer."""
        if self._prepared is None:
            weights = self._weights()
            made = select("decode_block", weights.qkv[0]).function(weights)
            self._prepared = NOT_HERE if made is None else made
        return self._prepared if isinstance(self._prepared, DecodeBlock) else None

    def _weights(self) -> BlockWeights:
        """Join the layers that read the same input."""
        attention, mlp = self.self_attn, self.mlp
        assert is_standard(self)
        assert isinstance(attention, Attention)
        assert isinstance(mlp, SwiGLU)
        q_norm, k_norm = attention.q_norm, attention.k_norm
        return BlockWeights(
            qkv=_join(attention.q_proj, attention.k_proj, attention.v_proj),
            o=_join(attention.o_proj),
            gate_up=_join(mlp.gate_proj, mlp.up_proj),
            down=_join(mlp.down_proj),
            norm_attention=self.input_layernorm.weight,
            norm_mlp=self.post_attention_layernorm.weight,
            norm_q=q_norm.weight if isinstance(q_norm, RMSNorm) else None,
            norm_k=k_norm.weight if isinstance(k_norm, RMSNorm) else None,
            n_heads=attention.n_heads,
            n_kv_heads=attention.n_kv_heads,
            d_head=attention.d_head,
            eps=self.input_layernorm.eps,
        )


def is_standard(block: Block) -> bool:
    """Whether a block is of the kind that `DecodeBlock` knows; others go layer by layer."""
    attention = block.self_attn
    return (
        isinstance(attention, Attention)
        and attention.rotates
        and attention.window is None
        and isinstance(block.mlp, SwiGLU)
        and isinstance(block.input_layernorm, RMSNorm)
    )


def _is_one_token(x: Tensor) -> bool:
    """Whether x is what `DecodeBlock` takes: (1, 1, D), fp32, contiguous, on the CPU."""
    return (
        x.shape[:2] == (1, 1)
        and x.dtype is torch.float32
        and x.is_contiguous()
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )


def _join(*layers: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the weights of INT8 layers one below the other, with their scales."""
    parts = [layer.get_buffer("weight_q") for layer in layers]
    scales = [layer.get_buffer("weight_scale") for layer in layers]
    return torch.cat(parts), torch.cat(scales).float()
