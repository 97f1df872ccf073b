"""A model directory: everything that is needed to use a model, in one folder.

| file                 | what                                                              |
|----------------------|-------------------------------------------------------------------|
| config.json          | the sizes and `format`: `float`, `int8-rotated` or `int4-rotated` |
| model.safetensors    | the weights                                                       |
| tokenizer.json       | the tokenizer the model was trained with                          |
| chat_template.jinja  | how a conversation becomes text                                   |
| manifest.json        | hashes of the above, lineage                                      |

The other formats are loaded by `tinyllm.quantization`, which also knows this form.
"""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from tinyllm.artifact import load_manifest, verify_files, write_json
from tinyllm.errors import ArtifactError, ParamsError
from tinyllm.model.sizes import ModelConfig
from tinyllm.model.transformer import Transformer
from tinyllm.params import build_params, to_plain

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER, CHAT_TEMPLATE = "tokenizer.json", "chat_template.jinja"
COPIED = (TOKENIZER, CHAT_TEMPLATE)
"""Files that every stage copies from the model or tokenizer it starts from."""


def save_model(model: Transformer, directory: Path) -> None:
    """Write config.json and model.safetensors in fp32 into an artifact that is being built."""
    save_weights(model.state_dict(), model.config, directory, weight_format="float")


def save_weights(
    state: dict[str, torch.Tensor], config: ModelConfig, directory: Path, *, weight_format: str
) -> None:
    """Write weights and sizes; a tied head is written once, as the embedding.

    Args:
        state: tensors by name; shared ones may appear under both names.
        config: the sizes.
        directory: an artifact's draft folder.
        weight_format: `float`, `int8-rotated` or `int4-rotated`.
    """
    if config.tie_embeddings:
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    write_json(directory / CONFIG, {"format": weight_format, **config.to_json()})


def load_config(directory: Path) -> tuple[ModelConfig, str]:
    """Return the sizes of a model directory and its weight format.

    Raises:
        ArtifactError: the folder is not a model directory, or its config is damaged.
    """
    path = directory / CONFIG
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        weight_format = document.pop("format")
        return build_params(ModelConfig, {**_left_out(), **document}, str(path)), weight_format
    except FileNotFoundError:
        raise ArtifactError(f"{directory}: not a model directory, it has no {CONFIG}") from None
    except (ValueError, KeyError, AttributeError, ParamsError) as error:
        raise ArtifactError(f"{path}: damaged: {error}") from None


def stored_as(directory: Path) -> str:
    """Return what the weights of a model directory are, in a word: float, int8 or int4.

    Raises:
        ArtifactError: as `load_config`.
    """
    return load_config(directory)[1].partition("-")[0]


def _left_out() -> dict[str, Any]:
    """Return the values that `ModelConfig.to_json` leaves out."""
    return {
        field.name: to_plain(field.default)
        for field in fields(ModelConfig)
        if field.default is not MISSING
    }


def load_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a model directory after checking every file against the manifest.

    Raises:
        ArtifactError: a file is missing, changed or unreadable.
    """
    verify_files(directory, load_manifest(directory))
    try:
        return safetensors.torch.load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise ArtifactError(f"{directory / WEIGHTS}: not readable: {error}") from None


def load_model(directory: Path) -> Transformer:
    """Return the model of a `float` model directory, in fp32 on the CPU, in evaluation mode.

    Raises:
        ArtifactError: the folder is not one, is damaged, or its weights do not fit its sizes.
    """
    config, weight_format = load_config(directory)
    if weight_format != "float":
        raise ArtifactError(
            f"{directory}: holds {weight_format} weights, float weights are needed here"
        )
    model = Transformer(config)
    fill_model(model, load_weights(directory), directory)
    return model.eval()


def fill_model(model: Transformer, tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Load tensors into a model, all of them and nothing else.

    Raises:
        ArtifactError: names or shapes do not fit; the folder is named.
    """
    if model.config.tie_embeddings:
        tensors = {**tensors, "lm_head.weight": tensors["embed_tokens.weight"]}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(f"{directory}: weights do not fit config.json: {error}") from None
