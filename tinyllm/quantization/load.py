"""Loads any model directory that the pipeline makes, whatever its weights are stored as."""

from pathlib import Path

from tinyllm.errors import ArtifactError
from tinyllm.model.directory import load_config, load_model, load_weights
from tinyllm.model.transformer import Transformer
from tinyllm.quantization.directory import FORMATS, with_tied_head
from tinyllm.quantization.int8 import empty_quantized_model


def load_any_model(directory: Path) -> Transformer:
    """Return the model of a directory of any format, on the CPU, in evaluation mode.

    Raises:
        ArtifactError: the folder is not one, is damaged, or its weights do not fit its sizes.
    """
    config, weight_format = load_config(directory)
    if weight_format == "float":
        return load_model(directory)
    if weight_format not in FORMATS:
        raise ArtifactError(
            f"{directory}: holds {weight_format!r} weights, this version knows float,"
            f" {', '.join(FORMATS)}; quantize the model again"
        )
    model = empty_quantized_model(Transformer(config), *FORMATS[weight_format])
    tensors = load_weights(directory)
    if config.tie_embeddings:
        tensors = with_tied_head(tensors)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise ArtifactError(f"{directory}: weights do not fit config.json: {lines}") from None
    return model.eval()
