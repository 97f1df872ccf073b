"""A config.json of `transformers` as sizes of ours, or a refusal that names what is not ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyllm.errors import DataError
from tinyllm.export.families import CLASSES, Family
from tinyllm.model.sizes import MlaSizes, ModelConfig, RopeScaling

Content = Mapping[str, Any]
_ONLY: dict[Family, dict[str, tuple[Any, ...]]] = {
    "llama": {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    "qwen3": {"hidden_act": ("silu",), "attention_bias": (False,)},
    "deepseek_v3": {
        **{"hidden_act": ("silu",), "attention_bias": (False,), "rope_interleave": (True,)},
    },
    "gpt2": {
        **{"activation_function": ("gelu_new", "gelu_pytorch_tanh")},
        **{"scale_attn_weights": (True,), "add_cross_attention": (False,)},
        **{"scale_attn_by_inverse_layer_idx": (False,)},
    },
}
"""Settings with the values that our model computes; an absent one is the first."""
_ROPE_ONLY = {"partial_rotary_factor": 1.0, "beta_fast": 32, "beta_slow": 1, "truncate": True}
"""Rotary settings that we compute with these values only."""


def read_config(content: Content, path: Path) -> tuple[Family, ModelConfig]:
    """Return the class and our sizes; dropout is left out: it belongs to a training run.

    Args:
        content: of config.json.
        path: for messages.

    Raises:
        DataError: the class or a setting is not ours, or a size is missing.
    """
    families = {name: name for name in CLASSES}
    family = families.get(content.get("model_type", ""))
    if family is None:
        raise DataError(
            f"{path}: model_type {content.get('model_type')!r} is not supported;"
            f" {', '.join(families)} are"
        )
    if "quantization_config" in content:
        raise DataError(f"{path}: the weights are quantised; take the float checkpoint")
    for name, values in _ONLY[family].items():
        if content.get(name, values[0]) not in values:
            raise DataError(f"{path}: {name} {content[name]!r} is not supported; {values[0]!r} is")
    try:
        return family, _gpt2(content) if family == "gpt2" else _rotary(content, family, path)
    except KeyError as error:
        raise DataError(f"{path}: has no {error.args[0]}") from None


def _gpt2(content: Content) -> ModelConfig:
    d, n_heads = content["n_embd"], content["n_head"]
    return ModelConfig(
        vocab_size=content["vocab_size"],
        d=d,
        n_layers=content["n_layer"],
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d // n_heads,
        d_ff=content.get("n_inner") or 4 * d,
        qk_norm=False,
        tie_embeddings=content.get("tie_word_embeddings", True),
        rope_base=1e4,
        norm_eps=content.get("layer_norm_epsilon", 1e-5),
        max_seq_len=content["n_positions"],
        ffn="gelu",
        norm="layernorm",
        bias=True,
        positions="learned",
    )


def _rotary(content: Content, family: Family, path: Path) -> ModelConfig:
    """Read Llama, Qwen3 and DeepSeek-V3."""
    d, n_heads, n_layers = (
        content[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    mla = _mla(content, n_layers, path) if family == "deepseek_v3" else None
    d_head = content.get("head_dim") or d // n_heads if mla is None else mla.d_nope + mla.d_rope
    base, scaling = _rope(content, latent=mla is not None, path=path)
    window, window_layers = _windows(content, n_layers) if family == "qwen3" else (None, ())
    return ModelConfig(
        vocab_size=content["vocab_size"],
        d=d,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads if mla else content.get("num_key_value_heads") or n_heads,
        d_head=d_head,
        d_ff=content["intermediate_size"],
        qk_norm=family == "qwen3",
        tie_embeddings=content.get("tie_word_embeddings", False),
        rope_base=base,
        norm_eps=content.get("rms_norm_eps", 1e-6),
        max_seq_len=content["max_position_embeddings"],
        mla=mla,
        window=window,
        window_layers=window_layers,
        rope_scaling=scaling,
    )


def _mla(content: Content, n_layers: int, path: Path) -> MlaSizes:
    n_dense = content.get("first_k_dense_replace", 3)
    if n_dense < n_layers:
        raise DataError(
            f"{path}: blocks from {n_dense} on are mixtures of experts; only dense ones are"
            " supported (first_k_dense_replace = num_hidden_layers)"
        )
    return MlaSizes(
        q_rank=content.get("q_lora_rank"),
        kv_rank=content["kv_lora_rank"],
        d_nope=content["qk_nope_head_dim"],
        d_rope=content["qk_rope_head_dim"],
        d_v=content["v_head_dim"],
    )


def _rope(content: Content, *, latent: bool, path: Path) -> tuple[float, RopeScaling]:
    """Read the rotary base and its scaling from the names of transformers 4 or 5."""
    rope = {**(content.get("rope_scaling") or {}), **(content.get("rope_parameters") or {})}
    base = float(rope.get("rope_theta") or content.get("rope_theta") or 1e4)
    kind = rope.get("rope_type", rope.get("type", "default"))
    for name, value in _ROPE_ONLY.items():
        if rope.get(name, content.get(name)) not in (None, value):
            raise DataError(f"{path}: rotary {name} {rope[name]!r} is not supported; {value} is")
    if kind == "default":
        return base, RopeScaling(kind="none", factor=1.0, original_len=None)
    if kind not in ("linear", "yarn"):
        raise DataError(
            f"{path}: rotary scaling {kind!r} is not supported; default, linear and yarn are"
        )
    if kind == "yarn":
        # DeepSeek-V3's two factors at 1: the softmax scale carries YaRN's, the tables none
        factors = [rope.get("mscale"), rope.get("mscale_all_dim"), rope.get("attention_factor")]
        expected = [1, 1, None] if latent else [None, None, None]
        if factors != expected:
            raise DataError(
                f"{path}: yarn with mscale, mscale_all_dim, attention_factor {factors} is not"
                f" supported; {expected} is"
            )
    longest = content["max_position_embeddings"]
    factor = float(rope["factor"])
    original = rope.get("original_max_position_embeddings") or round(longest / factor)
    return base, RopeScaling(kind=kind, factor=factor, original_len=original)


def _windows(content: Content, n_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Read which blocks of a Qwen3 have a window: a list, or all from `max_window_layers` on."""
    if not content.get("use_sliding_window") or content.get("sliding_window") is None:
        return None, ()
    first = content.get("max_window_layers", 28)
    kinds = content.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(n_layers)
    ]
    layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    return (content["sliding_window"], layers) if layers else (None, ())
