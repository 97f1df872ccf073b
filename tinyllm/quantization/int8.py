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
from tinyllm.ops.reference import hadamard
from tinyllm.quantization.calibration import (
    input_products,
    round_groups_to_inputs,
    round_to_inputs,
)
from tinyllm.quantization.layers import Int8Embedding, QuantizedLinear, QuantizedMatrix
from tinyllm.quantization.transformer import QuantizedTransformer

KINDS = (
    *("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"),
    *("gate_proj", "up_proj", "down_proj", "lm_head"),
)
"""The layers whose weights are quantised, by the last part of their name.

Latent attention's kv_b_proj is not among them: decoding absorbs it into queries and outputs.
"""
ROTATED = "down_proj"
"""The layer whose inputs, products of two numbers, have outliers: they are rotated first."""

ALWAYS_INT8 = ("embed_tokens", "lm_head")
"""What stays INT8 beside 4-bit layers: with a head in 4 bits the shipped model's val_bpb rose by
0.19 instead of 0.03 %."""


def quantize_model(
    model: Transformer,
    kinds: Collection[str] = KINDS,
    sample_BT: Tensor | None = None,
    weight_bits: int = 8,
) -> Transformer:
    """Return a copy of a model with its matrices in INT8 or 4 bits; the model stays as it is.

    A tied matrix is stored once and serves the embedding and the head, if both are quantised.

    Args:
        model: in floating point, on any device.
        kinds: which of `KINDS`; the rest stays in floating point.
        sample_BT: int64 tokens of text that tells which inputs the layers get, so that rounding
            can be compensated; None: every weight is rounded to the nearest.
        weight_bits: 8, or 4 for all but `ALWAYS_INT8`.

    Raises:
        DataError: its linear layers have a bias, which quantised ones lack, or, for 4 bits, an odd
            number of inputs.
    """
    if model.config.bias:
        raise DataError("quantize: quantised layers have no bias; train with model.bias: false")
    if weight_bits == 4:
        _check_inputs(model)
    quantized = copy.deepcopy(model).eval().requires_grad_(False)
    linear = {path: layer for _, path, layer in _layers(quantized) if isinstance(layer, nn.Linear)}
    products = {} if sample_BT is None else input_products(quantized, linear, sample_BT)
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for parent, path, layer in _layers(quantized):
        if _kind(path) in kinds:
            shared = layer.weight.data_ptr()  # an embedding comes first, and is never compensated
            if shared not in done:
                bits = _bits(path, weight_bits)
                weight = layer.weight.detach()
                done[shared] = _rounded(weight, products.get(path), _kind(path), bits)
            _replace(parent, path, layer, *done[shared])
    return QuantizedTransformer(quantized)


def _rounded(
    weight: Tensor, products: Tensor | None, kind: str, bits: int
) -> tuple[Tensor, Tensor]:
    """Return a weight's rows in 8 or 4 bits and their scales."""
    weight = weight.float()
    if kind == ROTATED:
        weight = hadamard(weight)
        products = None if products is None else hadamard(hadamard(products).T)
    if products is None:
        return quantize_groups(weight) if bits == 4 else quantize_per_row(weight)
    return (round_groups_to_inputs if bits == 4 else round_to_inputs)(weight, products)


def kinds_of(model: nn.Module) -> list[str]:
    """Return those of `KINDS` that a model has, in their order."""
    present = {_kind(path) for _, path, _ in _layers(model)}
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
    for parent, path, layer in _layers(model):
        n, k = layer.weight.shape
        if _bits(path, weight_bits) == 4:
            fresh = quantize_groups(torch.zeros(n, k))
        else:
            fresh = torch.zeros(n, k, dtype=torch.int8), torch.zeros(n)
        _replace(parent, path, layer, *done.setdefault(layer.weight.data_ptr(), fresh))
    return QuantizedTransformer(model.requires_grad_(False))


def _check_inputs(model: nn.Module) -> None:
    """Refuse layers that 4 bits cannot hold two inputs to a byte of."""
    for _, path, layer in _layers(model):
        if _kind(path) not in ALWAYS_INT8 and layer.weight.shape[1] % 2:
            raise DataError(
                f"quantize: 4-bit layers want an even number of inputs, {_kind(path)} has"
                f" {layer.weight.shape[1]}; set quantize.weight_bits: 8 or change model.d_ff"
            )


def _layers(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Return parent, path and layer of everything that `KINDS` means."""
    return [
        (parent, f"{parent_path}.{name}".lstrip("."), layer)
        for parent_path, parent in model.named_modules()
        for name, layer in parent.named_children()
        if name in KINDS
    ]


def _kind(path: str) -> str:
    """Return the last part of a layer's path."""
    return path.rpartition(".")[2]


def _bits(path: str, weight_bits: int) -> int:
    """Return the bits of a layer's weights where those of the blocks have `weight_bits`."""
    return 8 if _kind(path) in ALWAYS_INT8 else weight_bits


def _replace(parent: nn.Module, path: str, layer: Any, weight_q: Tensor, scale: Tensor) -> None:
    """Put the quantised layer in the place of the other."""
    made: QuantizedMatrix
    if isinstance(layer, nn.Linear):
        made = QuantizedLinear(weight_q, scale, is_rotated=_kind(path) == ROTATED)
    else:
        made = Int8Embedding(weight_q, scale)
    parent.add_module(_kind(path), made)
