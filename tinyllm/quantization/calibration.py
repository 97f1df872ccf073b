"""Rounding that makes up for its own errors, by text that shows which inputs a layer gets.

A weight rounded up makes the output a little too large; if its input often comes together with
another one, that one's weight, rounded down, takes most of the error away. GPTQ (Frantar et al.
2022, arXiv:2210.17323, algorithm 1) goes through the inputs one by one and moves each error to the
weights that are not rounded yet. The rounded weights are as many and as fast as any others.
Dimensions: N outputs, K inputs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tinyllm.ops.int4 import GROUP, HIGHEST, LOWEST, pack, quantize_groups
from tinyllm.ops.linear import quantize_per_row
from tinyllm.shards.stream import TokenStream

BLOCK = 64
"""Inputs whose errors are moved one by one; to those behind them they go all at once."""
DAMPING = 0.01
"""Share of the mean square that every input gets in addition: unseen ones stay near the nearest."""


def read_windows(stream: TokenStream, n_tokens: int, seq_len: int) -> Tensor:
    """Return the first whole windows of a stream, at most `n_tokens`, (windows, seq_len) int64."""
    ids = torch.from_numpy(stream.read(0, n_tokens))
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)


@torch.inference_mode()
def input_products(
    model: nn.Module, layers: Mapping[str, nn.Module], sample_BT: Tensor
) -> dict[str, Tensor]:
    """Return X^T X over all inputs X that each layer gets, (K, K) fp32, by the layer's name.

    Args:
        model: in floating point.
        layers: some of its linear layers.
        sample_BT: int64 tokens; windows go through the model one by one.
    """
    products: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        """Add up what a layer gets; the handle ends it."""

        def add(_: nn.Module, inputs: tuple[Tensor]) -> None:
            """Add the product of one pass."""
            x = inputs[0].float().flatten(0, -2)
            products[name] = products[name].addmm_(x.T, x) if name in products else x.T @ x

        return layer.register_forward_pre_hook(add)

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        for window in sample_BT:
            model(window[None])
    finally:
        for handle in handles:
            handle.remove()
    return products


@torch.inference_mode()
def round_to_inputs(weight: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """Return INT8 rows and their scales with a small error of the outputs, not of the weights.

    Args:
        weight: (N, K), fp32.
        products: (K, K), see `input_products`.

    Returns:
        As `quantize_per_row`: (N, K) and (N,); the scales are the same.
    """
    scale = quantize_per_row(weight)[1]
    return _compensate(weight, products, scale.expand(weight.shape[1], -1), (-127, 127)), scale


@torch.inference_mode()
def round_groups_to_inputs(weight: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `quantize_groups` does, the same scales, rounded as by `round_to_inputs`."""
    scale = quantize_groups(weight)[1]
    scale_KN = scale.float().T.repeat_interleave(GROUP, dim=0)[: weight.shape[1]]
    return pack(_compensate(weight, products, scale_KN, (LOWEST, HIGHEST))), scale


def _compensate(
    weight: Tensor, products: Tensor, scale_KN: Tensor, limits: tuple[int, int]
) -> Tensor:
    """Return weights divided by their scales and rounded, within the limits, (N, K) int8."""
    order = products.diagonal().argsort(descending=True)  # errors end in the least used inputs
    scale = scale_KN[order]
    steps = torch.where(scale.abs() > 0, 1 / scale, 0.0)
    hessian = products.double()[order][:, order]
    damping = DAMPING * hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    hessian.diagonal().add_(damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight.T[order].contiguous()  # (K, N): an input's weights lie together
    rounded = torch.empty_like(left)
    for start in range(0, len(left), BLOCK):
        errors = torch.zeros_like(left[start : start + BLOCK])
        end = start + len(errors)
        for i in range(start, end):
            # weights that are no numbers count as zero, as in `quantize_per_row`
            rounded[i] = (left[i] * steps[i]).round().clamp(*limits).nan_to_num(0.0)
            errors[i - start] = (left[i] - rounded[i] * scale[i]) / upper[i, i]
            left[i:end] -= upper[i, i:end, None] * errors[i - start]
        left[end:] -= upper[start:end, end:].T @ errors
    return rounded[order.argsort()].T.contiguous().to(torch.int8)
