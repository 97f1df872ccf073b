"""A model with its matrices in INT8, made from one in floating point or empty for loading."""

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from tinyllm.errors import DataError
from tinyllm.model.transformer import Transformer
from tinyllm.ops.linear import quantize_per_row
from tinyllm.ops.reference import hadamard
from tinyllm.quantization.calibration import input_products, round_to_inputs
from tinyllm.quantization.layers import Int8Embedding, Int8Linear, RotatedInt8Linear
from tinyllm.quantization.transformer import Int8Transformer

KINDS = (
    *("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"),
    *("gate_proj", "up_proj", "down_proj", "lm_head"),
)
"""The layers that have weights worth a byte each, by the last part of their name.

Latent attention's kv_b_proj is not among them: decoding absorbs it into queries and outputs.
"""
ROTATED = "down_proj"
"""The layer whose inputs, products of two numbers, have outliers: they are rotated first."""


def quantize_model(
    model: Transformer, kinds: Collection[str] = KINDS, sample_BT: Tensor | None = None
) -> Transformer:
    """Return a copy of a model with its matrices in INT8; the model itself stays as it is.

    A tied matrix is stored once and serves the embedding and the head, if both are quantised.

    Args:
        model: in floating point, on any device.
        kinds: which of `KINDS`; the rest stays in floating point.
        sample_BT: int64 tokens of text that tells which inputs the layers get, so that rounding
            can be compensated; None: every weight is rounded to the nearest.

    Raises:
        DataError: its linear layers have a bias, which INT8 layers lack.
    """
    if model.config.bias:
        raise DataError("quantize: INT8 layers have no bias; train with model.bias: false")
    quantized = copy.deepcopy(model).eval().requires_grad_(False)
    linear = {path: layer for _, path, layer in _layers(quantized) if isinstance(layer, nn.Linear)}
    products = {} if sample_BT is None else input_products(quantized, linear, sample_BT)
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for parent, path, layer in _layers(quantized):
        if _kind(path) in kinds:
            shared = layer.weight.data_ptr()  # an embedding comes first, and is never compensated
            if shared not in done:
                done[shared] = _rounded(layer.weight.detach(), products.get(path), _kind(path))
            _replace(parent, path, layer, *done[shared])
    return Int8Transformer(quantized)


def _rounded(weight: Tensor, products: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """Return a weight's INT8 rows and their scales."""
    weight = weight.float()
    if kind == ROTATED:
        weight = hadamard(weight)
        products = None if products is None else hadamard(hadamard(products).T)
    return quantize_per_row(weight) if products is None else round_to_inputs(weight, products)


def kinds_of(model: nn.Module) -> list[str]:
    """Return those of `KINDS` that a model has, in their order."""
    present = {_kind(path) for _, path, _ in _layers(model)}
    return [kind for kind in KINDS if kind in present]


def empty_int8_model(model: Transformer) -> Transformer:
    """Return the model with every matrix replaced by an INT8 one of zeros, to be filled by loading.

    Args:
        model: changed in place.
    """
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for parent, path, layer in _layers(model):
        n, k = layer.weight.shape
        fresh = torch.zeros(n, k, dtype=torch.int8), torch.zeros(n)
        _replace(parent, path, layer, *done.setdefault(layer.weight.data_ptr(), fresh))
    return Int8Transformer(model.requires_grad_(False))


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


def _replace(parent: nn.Module, path: str, layer: Any, weight_q: Tensor, scale: Tensor) -> None:
    """Put the INT8 layer in the place of the other."""
    if isinstance(layer, nn.Embedding):
        made: nn.Module = Int8Embedding(weight_q, scale)
    elif _kind(path) == ROTATED:
        made = RotatedInt8Linear(weight_q, scale)
    else:
        made = Int8Linear(weight_q, scale)
    parent.add_module(_kind(path), made)
