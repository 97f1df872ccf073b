"""A model directory as a folder that Hugging Face `transformers` loads without any of our code.

The class follows from the sizes: `LlamaForCausalLM`, or `Qwen3ForCausalLM` where queries and keys
are normalised. Our module names are theirs below `model.`, so no weight is changed or transposed.

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
import torch

from tinyllm.artifact import write_json, write_text
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

HEAD = "lm_head.weight"


def write_hf(source: Path, directory: Path, card: str) -> None:
    """Write the folder of a float model directory.

    Args:
        source: a `float` model directory; its files are checked against its manifest.
        directory: made if absent.
        card: the text of README.md.

    Raises:
        ArtifactError: the source is damaged.
    """
    config, _ = load_config(source)
    directory.mkdir(parents=True, exist_ok=True)
    weights = hf_weights(load_weights(source))
    safetensors.torch.save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    for name in COPIED:
        shutil.copyfile(source / name, directory / name)
    write_json(directory / "config.json", hf_config(config))
    write_json(directory / "generation_config.json", generation_config())
    write_json(directory / "tokenizer_config.json", tokenizer_config(config))
    write_text(directory / "README.md", card)


def hf_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors under the names of transformers.

    >>> list(hf_weights({"norm.weight": torch.ones(1), "lm_head.weight": torch.ones(1)}))
    ['model.norm.weight', 'lm_head.weight']
    """
    return {name if name == HEAD else f"model.{name}": w for name, w in weights.items()}


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the content of config.json.

    The rotary base and the dtype stand there twice: transformers 4 silently takes its own default
    (wrong logits, no warning) where it finds only the names of transformers 5.
    """
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **({} if config.qk_norm else {"mlp_bias": False}),
        "use_cache": True,
        "torch_dtype": "float32",
        "dtype": "float32",
        **_ids(),
    }


def generation_config() -> dict[str, Any]:
    """Return the content of generation_config.json: an answer ends with its turn or its text."""
    return {**_ids(), "eos_token_id": [_id(END_OF_TURN), _id(END_OF_TEXT)], "do_sample": False}


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


def _ids() -> dict[str, int]:
    return {
        "bos_token_id": _id(END_OF_TEXT),
        "eos_token_id": _id(END_OF_TURN),
        "pad_token_id": _id(PAD),
    }


def _id(token: str) -> int:
    """Return the id of a special token: they come first, in their order."""
    return SPECIAL_TOKENS.index(token)
