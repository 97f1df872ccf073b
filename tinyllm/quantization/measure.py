"""What quantisation costs: signal-to-noise ratios per kind of layer, bytes.

SQNR in dB is 10 log10(sum of squares of the exact values / sum of squares of the errors): 6 dB are
one bit. The noise of outputs contains that of the weights and that of the activations.
"""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tinyllm.model.transformer import Transformer
from tinyllm.quantization.int8 import KINDS

EXACT_DB = 200.0
"""Stands for no error at all: beyond what fp32 can hold, and a number where infinity is none."""


def sqnr_db(signal: float, noise: float) -> float:
    """Return the ratio of two sums of squares in dB; `sqnr_db(100.0, 1.0)` is 20.0."""
    if noise == 0.0:
        return EXACT_DB
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -EXACT_DB


@torch.inference_mode()
def measure_outputs(
    model: Transformer, quantized: Transformer, ids_BT: Tensor
) -> dict[str, dict[str, float]]:
    """Compare every layer's output, each fed with the exact model's activations.

    Args:
        model: in floating point.
        quantized: the same model, made by `quantize_model`.
        ids_BT: text to measure on, int64.

    Returns:
        By kind of layer: `sqnr_db` of the outputs, over all layers and tokens.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    twins = dict(quantized.named_modules())
    hooks = []

    def compare(kind: str, twin: nn.Module) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        """Return a hook that adds a layer's energy and its twin's error to those of its kind."""

        def add(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            """Add those of one pass."""
            error = twin(inputs[0]).double() - output.double()
            sums[kind][0] += output.double().square().sum().item()
            sums[kind][1] += error.square().sum().item()

        return add

    for name, layer in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind in KINDS:
            hooks.append(layer.register_forward_hook(compare(kind, twins[name])))
    try:
        model(ids_BT)
    finally:
        for handle in hooks:
            handle.remove()
    return {kind: {"sqnr_db": sqnr_db(*sums[kind])} for kind in KINDS if kind in sums}


def model_bytes(model: Transformer) -> dict[str, int]:
    """Return the bytes of a float model's distinct weights in fp32 and in bf16."""
    n = sum(parameter.numel() for parameter in model.parameters())
    return {"fp32_bytes": 4 * n, "bf16_bytes": 2 * n}
