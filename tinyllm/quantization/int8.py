"""A model with its matrices in INT8 or 4 bits, made from a float one or empty for loading."""

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from tinyllm.errors import DataError
from tinyllm.model.transformer import Transformer
from tinyllm.ops.int4 import quantize_groups
from tinyllm.ops.linear import quantize_per_row
from tinyllm.quantization.layers import Int4Linear, Int8Embedding, Int8Linear
from tinyllm.quantization.transformer import Int8Transformer

KINDS = (
    *("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"),
    *("gate_proj", "up_proj", "down_proj", "lm_head"),
)
"""The layers that have weights worth a byte each, by the last part of their name.

Latent attention's kv_b_proj is not among them: decoding absorbs it into queries and outputs.
"""

ALWAYS_INT8 = ("embed_tokens", "lm_head")
"""What stays INT8 beside 4-bit layers: with a head in 4 bits the shipped model's val_bpb rose by
0.19 instead of 0.03 %."""


def quantize_model(
    model: Transformer, kinds: Collection[str] = KINDS, weight_bits: int = 8
) -> Transformer:
    """Return a copy of a model with its matrices in INT8; the model itself stays as it is.

    A tied matrix is stored once and serves the embedding and the head, if both are quantised.

    Args:
        model: in floating point, on any device.
        kinds: which of `KINDS`; the rest stays in floating point.
        weight_bits: 8, or 4 for all but `ALWAYS_INT8`.

    Raises:
        DataError: its linear layers have a bias, which INT8 layers lack, or, for 4 bits, an odd
            number of inputs.
    """
    if model.config.bias:
        raise DataError("quantize: INT8 layers have no bias; train with model.bias: false")
    if weight_bits == 4:
        _check_inputs(model)
    quantized = copy.deepcopy(model).eval().requires_grad_(False)
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for parent, name, layer in _layers(quantized):
        if name in kinds:
            shared = layer.weight.data_ptr()
            if shared not in done:
                in_int4 = weight_bits == 4 and name not in ALWAYS_INT8
                quantize = quantize_groups if in_int4 else quantize_per_row
                done[shared] = quantize(layer.weight.detach())
            _replace(parent, name, layer, *done[shared])
    return Int8Transformer(quantized)


def kinds_of(model: nn.Module) -> list[str]:
    """Return those of `KINDS` that a model has, in their order."""
    present = {name for _, name, _ in _layers(model)}
    return [kind for kind in KINDS if kind in present]


def empty_quantized_model(model: Transformer, weight_bits: int) -> Transformer:
    """Return the model with every matrix replaced by a quantised one, to be filled by loading.

    Args:
        model: changed in place; its numbers are of no importance.
        weight_bits: as in `quantize_model`.

    Raises:
        DataError: as in `quantize_model`.
    """
    if weight_bits == 4:
        _check_inputs(model)
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for parent, name, layer in _layers(model):
        n, k = layer.weight.shape
        if weight_bits == 4 and name not in ALWAYS_INT8:
            fresh = quantize_groups(torch.zeros(n, k))
        else:
            fresh = torch.zeros(n, k, dtype=torch.int8), torch.zeros(n)
        _replace(parent, name, layer, *done.setdefault(layer.weight.data_ptr(), fresh))
    return Int8Transformer(model.requires_grad_(False))


def _check_inputs(model: nn.Module) -> None:
    """Refuse layers that 4 bits cannot hold two inputs to a byte of."""
    for _, name, layer in _layers(model):
        if name not in ALWAYS_INT8 and layer.weight.shape[1] % 2:
            raise DataError(
                f"quantize: 4-bit layers want an even number of inputs, {name} has"
                f" {layer.weight.shape[1]}; set quantize.weight_bits: 8 or change model.d_ff"
            )


def _layers(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Return parent, name and layer of everything that `KINDS` means."""
    return [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if name in KINDS
    ]


def _replace(parent: nn.Module, name: str, layer: Any, weight_q: Tensor, scale: Tensor) -> None:
    """Put the quantised layer in the place of the other."""
    kind: type[nn.Module] = Int4Linear if weight_q.dtype is torch.uint8 else Int8Linear
    if isinstance(layer, nn.Embedding):
        kind = Int8Embedding
    parent.add_module(name, kind(weight_q, scale))
