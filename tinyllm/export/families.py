"""Which class of `transformers` is the same architecture as a model of ours, and its config.json.

| class               | attention            | norm      | feed-forward | positions | biases |
|---------------------|----------------------|-----------|--------------|-----------|--------|
| LlamaForCausalLM    | grouped              | RMSNorm   | SwiGLU       | RoPE      | no     |
| Qwen3ForCausalLM    | grouped, query-key norm, windows | RMSNorm | SwiGLU | RoPE    | no     |
| DeepseekV3ForCausalLM | latent; no experts | RMSNorm   | SwiGLU       | RoPE      | no     |
| GPT2LMHeadModel     | multi-head           | LayerNorm | GELU (tanh)  | learned   | yes    |

Reading their config.json is the business of `hf_import.py`.
"""

from collections.abc import Mapping
from typing import Any, Literal

from tinyllm.errors import DataError
from tinyllm.model.sizes import ModelConfig

Family = Literal["llama", "qwen3", "deepseek_v3", "gpt2"]
CLASSES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_LLAMA = {
    **{"attention": "gqa", "norm": "rmsnorm", "ffn": "swiglu", "bias": False},
    **{"positions": "rope", "qk_norm": False, "window": None},
}
_WANTED: dict[Family, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen3": {name: v for name, v in _LLAMA.items() if name != "window"} | {"qk_norm": True},
    "deepseek_v3": {**_LLAMA, "attention": "mla"},
    "gpt2": {
        **{"attention": "gqa", "norm": "layernorm", "ffn": "gelu", "bias": True},
        **{"positions": "learned", "qk_norm": False, "window": None, "n_kv_heads": "n_heads"},
    },
}
"""What each class can only be, under the names of params.yaml."""


def misfits(config: ModelConfig) -> dict[Family, dict[str, Any]]:
    """Return for each class what it cannot be of an architecture, as the values it would need."""
    ours = {
        **config.to_json(),
        **{"attention": "gqa" if config.mla is None else "mla", "window": config.window},
        **{"norm": config.norm, "ffn": config.ffn, "bias": config.bias},
        **{"positions": config.positions, "qk_norm": config.qk_norm},
        "n_kv_heads": "n_heads" if config.n_kv_heads == config.n_heads else config.n_kv_heads,
    }
    return {
        family: {name: value for name, value in wanted.items() if ours[name] != value}
        for family, wanted in _WANTED.items()
    }


def spell(changes: Mapping[str, Any]) -> str:
    """Return changes of the architecture as one types them.

    >>> spell({"window": None, "qk_norm": True})
    'model.window=null, model.qk_norm=true'
    """
    return ", ".join(f"model.{name}={_yaml(value)}" for name, value in changes.items())


def family_of(config: ModelConfig) -> Family:
    """Return the class that gives the same logits.

    Raises:
        DataError: there is none; the message names the nearest and what it would take.
    """
    missing = misfits(config)
    nearest = min(missing, key=lambda family: len(missing[family]))
    if not missing[nearest]:
        return nearest
    raise DataError(
        f"export: transformers has no class for this architecture; the nearest,"
        f" {CLASSES[nearest]}, would need {spell(missing[nearest])}"
    )


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the content of config.json, without what the tokenizer decides.

    The rotary base and the dtype stand there twice: transformers 4 silently takes its own default
    (wrong logits, no warning) where it finds only the names of transformers 5.

    Raises:
        DataError: no class of transformers has this architecture.
    """
    family = family_of(config)
    shared = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "torch_dtype": "float32",
        "dtype": "float32",
    }
    return {**shared, **(_gpt2(config) if family == "gpt2" else _rotary(config, family))}


def _gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": config.d,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "n_positions": config.max_seq_len,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": 0.0,
    }


def _rotary(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return what Llama, Qwen3 and DeepSeek-V3 share, and what is their own."""
    rope = _rope_parameters(config)
    content = {
        "hidden_size": config.d,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_parameters": rope,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }
    if config.rope_scaling.kind != "none":
        content["rope_scaling"] = {name: v for name, v in rope.items() if name != "rope_theta"}
    if config.mla is not None:
        return content | _deepseek(config)
    content["head_dim"] = config.d_head
    if family == "llama":
        return content | {"mlp_bias": False}
    if config.window is not None:
        kinds = {True: "sliding_attention", False: "full_attention"}
        layers = [kinds[i in config.window_layers] for i in range(config.n_layers)]
        content |= {"use_sliding_window": True, "sliding_window": config.window}
        content |= {"layer_types": layers}
    return content


def _rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """Return the rotary settings; DeepSeek-V3 applies YaRN's factor to the softmax scale, as we do.

    There `mscale_all_dim` is of the scale, and `mscale` equal to it leaves the tables alone.
    """
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return {"rope_type": "default", "rope_theta": config.rope_base}
    rope: dict[str, Any] = {"rope_type": scaling.kind}
    rope |= {"rope_theta": config.rope_base, "factor": scaling.factor}
    if scaling.kind == "yarn":
        rope["original_max_position_embeddings"] = scaling.original_len
        rope |= {} if config.mla is None else {"mscale": 1.0, "mscale_all_dim": 1.0}
    return rope


def _deepseek(config: ModelConfig) -> dict[str, Any]:
    """Return latent attention, and experts that no layer uses."""
    assert config.mla is not None
    return {
        "q_lora_rank": config.mla.q_rank,
        "kv_lora_rank": config.mla.kv_rank,
        "qk_nope_head_dim": config.mla.d_nope,
        "qk_rope_head_dim": config.mla.d_rope,
        "v_head_dim": config.mla.d_v,
        "rope_interleave": True,
        "first_k_dense_replace": config.n_layers,
        "num_nextn_predict_layers": 0,
        "n_routed_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": config.d_ff,
    }


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if value in (True, False) else str(value)
