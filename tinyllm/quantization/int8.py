"""A model with its matrices in INT8, made from one in floating point or empty for loading."""

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from tinyllm.errors import DataError
from tinyllm.model.transformer import Transformer
from tinyllm.ops.linear import quantize_per_row
from tinyllm.quantization.layers import Int8Embedding, Int8Linear
from tinyllm.quantization.transformer import Int8Transformer

KINDS = (
    *("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"),
    *("gate_proj", "up_proj", "down_proj", "lm_head"),
)
"""The layers that have weights worth a byte each, by the last part of their name.

Latent attention's kv_b_proj is not among them: decoding absorbs it into queries and outputs.
"""


def quantize_model(model: Transformer, kinds: Collection[str] = KINDS) -> Transformer:
    """Return a copy of a model with its matrices in INT8; the model itself stays as it is.

    A tied matrix is stored once and serves the embedding and the head, if both are quantised.

    Args:
        model: in floating point, on any device.
        kinds: which of `KINDS`; the rest stays in floating point.

    Raises:
        DataError: its linear layers have a bias, which INT8 layers lack.
    """
    if model.config.bias:
        raise DataError("quantize: INT8 layers have no bias; train with model.bias: false")
    quantized = copy.deepcopy(model).eval().requires_grad_(False)
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for parent, name, layer in _layers(quantized):
        if name in kinds:
            shared = layer.weight.data_ptr()
            if shared not in done:
                done[shared] = quantize_per_row(layer.weight.detach())
            _replace(parent, name, layer, *done[shared])
    return Int8Transformer(quantized)


def kinds_of(model: nn.Module) -> list[str]:
    """Return those of `KINDS` that a model has, in their order."""
    present = {name for _, name, _ in _layers(model)}
    return [kind for kind in KINDS if kind in present]


def empty_int8_model(model: Transformer) -> Transformer:
    """Return the model with every matrix replaced by an INT8 one of zeros, to be filled by loading.

    Args:
        model: changed in place.
    """
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for parent, name, layer in _layers(model):
        n, k = layer.weight.shape
        fresh = torch.zeros(n, k, dtype=torch.int8), torch.zeros(n)
        _replace(parent, name, layer, *done.setdefault(layer.weight.data_ptr(), fresh))
    return Int8Transformer(model.requires_grad_(False))


def _layers(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Return parent, name and layer of everything that `KINDS` means."""
    return [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if name in KINDS
    ]


def _replace(parent: nn.Module, name: str, layer: Any, weight_q: Tensor, scale: Tensor) -> None:
    """Put the INT8 layer in the place of the other."""
    kind = Int8Embedding if isinstance(layer, nn.Embedding) else Int8Linear
    parent.add_module(name, kind(weight_q, scale))
