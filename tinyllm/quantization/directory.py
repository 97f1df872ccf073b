"""INT8 model directories: as float ones (`tinyllm.model.directory`), `format` int8-rotated.

Each matrix `<layer>.weight` becomes `<layer>.weight_q` (int8) and `<layer>.weight_scale` (fp32, one
per row); a tied head is written once, as the embedding.
"""

from pathlib import Path

from torch import Tensor

from tinyllm.model.directory import save_weights
from tinyllm.model.transformer import Transformer

FORMAT = "int8-rotated"
"""It was `int8` before down_proj was rotated: such weights would load, and give nonsense."""
HEAD, EMBEDDING = "lm_head.", "embed_tokens."


def save_int8_model(model: Transformer, directory: Path) -> None:
    """Write config.json and model.safetensors of a quantised model into an artifact's draft."""
    state = model.state_dict()
    if model.config.tie_embeddings:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(HEAD)}
    save_weights(state, model.config, directory, weight_format=FORMAT)


def with_tied_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the embedding's also under the head's names."""
    tied = {
        HEAD + name.removeprefix(EMBEDDING): tensor
        for name, tensor in tensors.items()
        if name.startswith(EMBEDDING)
    }
    return {**tensors, **tied}
