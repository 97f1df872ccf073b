"""INT8 model directories: as float ones (`tinyllm.model.directory`), with `format` int8 or int4.

Each matrix `<layer>.weight` becomes `<layer>.weight_q` (int8) and `<layer>.weight_scale` (fp32, one
per row); a tied head is written once, as the embedding. In `int4` the layers of the blocks have
`weight_q` in uint8, two numbers in a byte, and `weight_scale` in bf16 (`tinyllm.ops.int4`).
"""

from pathlib import Path

from torch import Tensor

from tinyllm.model.directory import save_weights
from tinyllm.model.transformer import Transformer
from tinyllm.quantization.layers import Int4Linear

HEAD, EMBEDDING = "lm_head.", "embed_tokens."
WEIGHT_BITS = {"int8": 8, "int4": 4}
"""Bits of the weights in the blocks, by the `format` of a directory."""


def save_quantized_model(model: Transformer, directory: Path) -> None:
    """Write config.json and model.safetensors of a quantised model into an artifact's draft."""
    state = model.state_dict()
    if model.config.tie_embeddings:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(HEAD)}
    is_int4 = any(isinstance(layer, Int4Linear) for layer in model.modules())
    save_weights(state, model.config, directory, weight_format="int4" if is_int4 else "int8")


def with_tied_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the embedding's also under the head's names."""
    tied = {
        HEAD + name.removeprefix(EMBEDDING): tensor
        for name, tensor in tensors.items()
        if name.startswith(EMBEDDING)
    }
    return {**tensors, **tied}
