"""A LoRA adapter and its base for Hugging Face `peft`.

| file                      | what                                                            |
|---------------------------|-----------------------------------------------------------------|
| base/                     | the model that the adapter was trained on, as `hf.py` writes it |
| adapter_config.json       | as in the adapter's folder                                      |
| adapter_model.safetensors | with the rows in transformers' order |

`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("peft/base"), "peft")` is the merged
model again.
"""

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


def peft_refuses(config: ModelConfig) -> str | None:
    """Return why our adapter has no place in transformers' class, or None."""
    if reason := hf_refuses(config):
        return reason
    if family_of(config) == "gpt2":
        return "GPT2LMHeadModel has one matrix for q, k and v, our adapter three; export it merged"
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
