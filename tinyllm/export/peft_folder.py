"""A LoRA adapter and its base for Hugging Face `peft`.

| file                      | what                                                            |
|---------------------------|-----------------------------------------------------------------|
| base/                     | the model that the adapter was trained on, as `hf.py` writes it |
| adapter_config.json       | as in the adapter's folder                                      |
| adapter_model.safetensors | with the rows in transformers' order |

`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("peft/base"), "peft")` is the merged
model again.
"""

import json
import shutil
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from tinyllm.artifact import load_manifest, merge_lineage, verify_files
from tinyllm.errors import ArtifactError
from tinyllm.export.families import family_of, hf_refuses
from tinyllm.export.hf import write_hf
from tinyllm.export.hf_weights import adapter_to_hf
from tinyllm.model.directory import load_config
from tinyllm.model.sizes import ModelConfig

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
_EXPERTS = {"gate_proj", "up_proj", "down_proj"}
"""What peft 0.21 renames in every model of this class: `transformers_weight_conversion.py`."""


def peft_refuses(config: ModelConfig, adapter: Path) -> str | None:
    """Return why peft cannot put an adapter of ours on transformers' class, or None.

    Args:
        config: the base's sizes.
        adapter: an `adapter` artifact.
    """
    if reason := hf_refuses(config):
        return reason
    family = family_of(config)
    if family == "gpt2":
        return "GPT2LMHeadModel has one matrix for q, k and v, our adapter three; hf/ has it merged"
    targets = json.loads((adapter / ADAPTER_CONFIG).read_text("utf-8"))["target_modules"]
    if family == "deepseek_v3" and (layers := sorted(set(targets) & _EXPERTS)):
        return (
            f"peft takes {', '.join(layers)} of DeepSeek-V3 for experts, also where all are dense;"
            " lora.targets with attention layers only works, and hf/ has it merged"
        )
    return None


def write_peft(base: Path, adapter: Path, directory: Path, card: str) -> None:
    """Write an adapter with its base.

    Args:
        base: the model directory that the adapter was trained on.
        adapter: an `adapter` artifact.
        directory: made if absent.
        card: the text of the base's README.md.

    Raises:
        LineageError: the adapter was trained on another base.
        ArtifactError: a folder is damaged.
    """
    merge_lineage([base, adapter])
    verify_files(adapter, load_manifest(adapter, "adapter"))
    write_hf(base, directory / "base", card)
    try:
        tensors = safetensors.torch.load_file(adapter / ADAPTER_WEIGHTS)
    except SafetensorError as error:
        raise ArtifactError(f"{adapter / ADAPTER_WEIGHTS}: not readable: {error}") from None
    rows = adapter_to_hf(tensors, load_config(base)[0])
    safetensors.torch.save_file(rows, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    shutil.copyfile(adapter / ADAPTER_CONFIG, directory / ADAPTER_CONFIG)
