"""A model directory as a folder that Hugging Face `transformers` loads without any of our code.

The class follows from the architecture: `families.py` chooses it, `hf_weights.py` names the tensors
as it does. No value is changed.

| file                   | what                                                   |
|------------------------|--------------------------------------------------------|
| config.json            | the sizes, in their names                              |
| model.safetensors      | fp32 weights                                           |
| tokenizer.json         | as in the model directory                              |
| tokenizer_config.json  | which special token is what                            |
| chat_template.jinja    | as in the model directory                              |
| generation_config.json | where an answer ends                                   |
| README.md              | the model card                                         |
"""

import shutil
from pathlib import Path
from typing import Any

import safetensors.torch

from tinyllm.artifact import write_json, write_text
from tinyllm.export.families import family_of, hf_config
from tinyllm.export.hf_weights import to_hf
from tinyllm.model.directory import COPIED, WEIGHTS, load_config, load_weights
from tinyllm.model.sizes import ModelConfig
from tinyllm.tokenizer.special import (
    ASSISTANT,
    END_OF_TEXT,
    END_OF_TURN,
    PAD,
    SPECIAL_TOKENS,
    SYSTEM,
    USER,
)


def write_hf(source: Path, directory: Path, card: str) -> None:
    """Write the folder of a float model directory.

    Args:
        source: a `float` model directory; its files are checked against its manifest.
        directory: made if absent.
        card: the text of README.md.

    Raises:
        ArtifactError: the source is damaged.
        DataError: no class of transformers has this architecture.
    """
    config, _ = load_config(source)
    content = {**hf_config(config), **special_ids()}
    directory.mkdir(parents=True, exist_ok=True)
    weights = to_hf(load_weights(source), config, family_of(config))
    safetensors.torch.save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    for name in COPIED:
        shutil.copyfile(source / name, directory / name)
    write_json(directory / "config.json", content)
    write_json(directory / "generation_config.json", generation_config())
    write_json(directory / "tokenizer_config.json", tokenizer_config(config))
    write_text(directory / "README.md", card)


def generation_config() -> dict[str, Any]:
    """Return the content of generation_config.json: an answer ends with its turn or its text."""
    return {
        **special_ids(),
        "eos_token_id": [_id(END_OF_TURN), _id(END_OF_TEXT)],
        "do_sample": False,
    }


def tokenizer_config(config: ModelConfig) -> dict[str, Any]:
    """Return the content of tokenizer_config.json: nothing is added to or cleaned from the text."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TURN,
        "pad_token": PAD,
        "extra_special_tokens": [SYSTEM, USER, ASSISTANT],
        "model_max_length": config.max_seq_len,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }


def special_ids() -> dict[str, int]:
    """Return the ids of the tokens that every config.json names."""
    return {
        "bos_token_id": _id(END_OF_TEXT),
        "eos_token_id": _id(END_OF_TURN),
        "pad_token_id": _id(PAD),
    }


def _id(token: str) -> int:
    """Return the id of a special token: they come first, in their order."""
    return SPECIAL_TOKENS.index(token)
