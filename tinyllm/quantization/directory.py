"""Quantised model directories: as float ones (`tinyllm.model.directory`), but for `format`.

Each matrix `<layer>.weight` becomes `<layer>.weight_q` (int8) and `<layer>.weight_scale` (fp32, one
per row); a tied head is written once, as the embedding. In `int4-rotated` the layers of the blocks
have `weight_q` in uint8, two numbers in a byte, and `weight_scale` in bf16 (`tinyllm.ops.int4`).
Behind `-a16` the same numbers meet activations of 16 bits.
"""

from pathlib import Path

from torch import Tensor

from tinyllm.model.directory import load_config, save_weights
from tinyllm.model.transformer import Transformer
from tinyllm.quantization.layers import QuantizedLinear

FORMATS = {
    "int8-rotated": (8, 8),
    "int4-rotated": (4, 8),
    "int8-rotated-a16": (8, 16),
    "int4-rotated-a16": (4, 16),
}
"""Bits of the weights in the blocks and of activations, by `format`. It was `int8` before down_proj
was rotated: such weights would load, and give nonsense."""
HEAD, EMBEDDING = "lm_head.", "embed_tokens."


def save_quantized_model(model: Transformer, directory: Path) -> None:
    """Write config.json and model.safetensors of a quantised model into an artifact's draft."""
    state = model.state_dict()
    if model.config.tie_embeddings:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(HEAD)}
    bits = weight_bits(model), activation_bits(model)
    weight_format = next(name for name, known in FORMATS.items() if known == bits)
    save_weights(state, model.config, directory, weight_format=weight_format)


def weight_bits(model: Transformer) -> int:
    """Return the bits of a quantised model's weights in the blocks, 8 or 4; its head has 8."""
    return min(layer.bits for layer in model.modules() if isinstance(layer, QuantizedLinear))


def activation_bits(model: Transformer) -> int:
    """Return what a quantised model's activations are rounded to, 8 or 16."""
    layers = (layer for layer in model.modules() if isinstance(layer, QuantizedLinear))
    return next(layers).activation_bits


def short_format(directory: Path) -> str:
    """Return what a quantised model is in a name: int8, int4, int8_a16, int4_a16."""
    return load_config(directory)[1].replace("-rotated", "").replace("-", "_")


def with_tied_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the embedding's also under the head's names."""
    tied = {
        HEAD + name.removeprefix(EMBEDDING): tensor
        for name, tensor in tensors.items()
        if name.startswith(EMBEDDING)
    }
    return {**tensors, **tied}
