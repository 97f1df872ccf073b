"""A Hugging Face folder as a model directory: the way back of `hf.py`.

Read are config.json, the safetensors and, where they are there, tokenizer.json and the chat
template. Classes: those of `families.py`. What our model does not compute is refused, never
approximated. Weights are stored in fp32. A tokenizer is copied as it is: `tinyllm chat` needs one
of ours (six special tokens first), others are used through the `tokenizers` library.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from tinyllm.artifact import build_artifact, write_text
from tinyllm.errors import ArtifactError, DataError
from tinyllm.export.families import CLASSES
from tinyllm.export.hf_config import read_config
from tinyllm.export.hf_weights import HEAD, from_hf
from tinyllm.model.directory import CHAT_TEMPLATE, CONFIG, TOKENIZER, WEIGHTS, save_weights
from tinyllm.model.sizes import ModelConfig
from tinyllm.model.transformer import Transformer

KIND = "imported"
INDEX = f"{WEIGHTS}.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def import_hf(folder: Path, out: Path) -> None:
    """Write a model directory from a checkpoint of Llama, Qwen3, dense DeepSeek-V3 or GPT-2.

    Args:
        folder: with config.json and model.safetensors, or its parts with their index.
        out: the model directory; an older one there is replaced.

    Raises:
        DataError: the architecture or a setting is not ours, or the weights are pickled.
        ArtifactError: files are missing, damaged or do not fit together.
    """
    content = read_json(folder / CONFIG)
    family, config = read_config(content, folder / CONFIG)
    state = from_hf(read_tensors(folder), config, family)
    _check_fit(state, config, folder)
    state = {name: w.float() for name, w in state.items()}
    with build_artifact(out, kind=KIND, made_from=[], config=content) as draft:
        save_weights(state, config, draft.path, weight_format="float")
        if (folder / TOKENIZER).is_file():
            shutil.copyfile(folder / TOKENIZER, draft.path / TOKENIZER)
        template = _chat_template(folder)
        if template is not None:
            write_text(draft.path / CHAT_TEMPLATE, template)
        draft.info["imported_class"] = CLASSES[family]


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file.

    Raises:
        ArtifactError: missing, or not a mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; name a Hugging Face model's folder") from None
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: must be a mapping")
    return content


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of the folder, under the names they have there."""
    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (folder / INDEX).is_file():
        places: Mapping[str, str] = read_json(folder / INDEX).get("weight_map", {})
        files = sorted({Path(name).name for name in places.values()})  # no way out of the folder
    else:
        pickled = sorted(path.name for kind in PICKLED for path in folder.glob(kind))
        if pickled:
            raise DataError(
                f"{folder}: {pickled[0]} is a pickle, and reading one can run any program;"
                f" take the checkpoint's {WEIGHTS} instead"
            )
        raise ArtifactError(f"{folder}: has no {WEIGHTS}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= safetensors.torch.load_file(folder / file)
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ArtifactError(f"{folder / file}: not readable: {reason}") from None
    return tensors


def _check_fit(state: Mapping[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """Refuse tensors that are not exactly those of the model that config.json describes."""
    with torch.device("meta"):
        wanted = Transformer(config).state_dict()
    if config.tie_embeddings:
        del wanted[HEAD]
    for name in [*wanted, *state]:
        if name not in state or name not in wanted:
            which = "is missing" if name not in state else "has no place in this architecture"
            raise ArtifactError(f"{folder}: weights do not fit {CONFIG}: {name} {which}")
        if state[name].shape != wanted[name].shape:
            raise ArtifactError(
                f"{folder}: weights do not fit {CONFIG}: {name} is {tuple(state[name].shape)},"
                f" not {tuple(wanted[name].shape)}"
            )
        if state[name].dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise DataError(f"{folder}: {name} is {state[name].dtype}; only float weights are read")


def _chat_template(folder: Path) -> str | None:
    """Return the chat template: its own file, or a string in tokenizer_config.json."""
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    if not (folder / "tokenizer_config.json").is_file():
        return None
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None
