"""Quantised model directories: as float ones (`tinyllm.model.directory`), but for `format`.

Each matrix `<layer>.weight` becomes `<layer>.weight_q` (int8) and `<layer>.weight_scale` (fp32, one
per row); a tied head is written once, as the embedding. In `int4-rotated` the layers of the blocks
have `weight_q` in uint8, two numbers in a byte, and `weight_scale` in bf16 (`tinyllm.ops.int4`).
"""

from pathlib import Path

from torch import Tensor

from tinyllm.model.directory import save_weights
from tinyllm.model.transformer import Transformer
from tinyllm.quantization.layers import QuantizedLinear

FORMATS = {"int8-rotated": 8, "int4-rotated": 4}
"""Bits of the weights in the blocks, by `format`. It was `int8` before down_proj was rotated: such
weights would load, and give nonsense."""
HEAD, EMBEDDING = "lm_head.", "embed_tokens."


def save_quantized_model(model: Transformer, directory: Path) -> None:
    """Write config.json and model.safetensors of a quantised model into an artifact's draft."""
    state = model.state_dict()
    if model.config.tie_embeddings:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(HEAD)}
    weight_format = next(name for name, bits in FORMATS.items() if bits == weight_bits(model))
    save_weights(state, model.config, directory, weight_format=weight_format)


def weight_bits(model: Transformer) -> int:
    """Return the bits of a quantised model's weights in the blocks, 8 or 4; its head has 8."""
    return min(layer.bits for layer in model.modules() if isinstance(layer, QuantizedLinear))


def with_tied_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the embedding's also under the head's names."""
    tied = {
        HEAD + name.removeprefix(EMBEDDING): tensor
        for name, tensor in tensors.items()
        if name.startswith(EMBEDDING)
    }
    return {**tensors, **tied}
