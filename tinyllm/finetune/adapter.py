"""A LoRA adapter on disk, in the form of the `peft` library.

| file                      | what                                                            |
|---------------------------|-----------------------------------------------------------------|
| adapter_config.json       | rank, alpha, target layers                                      |
| adapter_model.safetensors | A and B of each layer, under the names that peft gives them     |

`PeftModel.from_pretrained(exported_base_model, folder)` loads it on top of what `export` writes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from tinyllm.artifact import load_manifest, verify_files, write_json
from tinyllm.errors import ArtifactError
from tinyllm.finetune.lora import add_lora, lora_layers
from tinyllm.model.transformer import Transformer

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class _Shape:
    """The shape of a stored adapter."""

    rank: int
    alpha: float
    dropout: float
    targets: Sequence[str]


def save_adapter(model: Transformer, directory: Path) -> None:
    """Write the additions of an adapted model into an artifact that is being built."""
    layers = lora_layers(model)
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers:
        for which, matrix in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            tensors[f"{_peft_name(name)}.{which}.weight"] = matrix.detach().cpu().contiguous()
    safetensors.torch.save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    _, first = layers[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout.p,
        "target_modules": sorted({name.rpartition(".")[2] for name, _ in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(directory / ADAPTER_CONFIG, config)


def load_adapter(model: Transformer, directory: Path) -> Transformer:
    """Put a saved adapter on its base model, in place; return the model in evaluation mode.

    Raises:
        ArtifactError: the folder is no adapter, is damaged, or was made for other sizes.
    """
    verify_files(directory, load_manifest(directory, "adapter"))
    try:
        config: dict[str, Any] = json.loads((directory / ADAPTER_CONFIG).read_text("utf-8"))
        tensors = safetensors.torch.load_file(directory / ADAPTER_WEIGHTS)
        shape = _Shape(
            config["r"], config["lora_alpha"], config["lora_dropout"], config["target_modules"]
        )
        add_lora(model, shape, seed=0)
        with torch.no_grad():
            for name, layer in lora_layers(model):
                layer.lora_A.copy_(tensors.pop(f"{_peft_name(name)}.lora_A.weight"))
                layer.lora_B.copy_(tensors.pop(f"{_peft_name(name)}.lora_B.weight"))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{directory}: not an adapter of this model: {reason}") from None
    if tensors:
        raise ArtifactError(f"{directory}: made for another model: it has {min(tensors)}")
    return model.eval()


def _peft_name(name: str) -> str:
    """Return peft's name of a layer: the head stands beside the model in transformers' classes."""
    inner = name if name == "lm_head" else f"model.{name}"
    return f"base_model.model.{inner}"
