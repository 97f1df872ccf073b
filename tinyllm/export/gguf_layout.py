"""How llama.cpp sees a model: its architecture, the sizes it reads, the tensors it wants.

| ours          | architecture | what it wants otherwise                                        |
|---------------|--------------|----------------------------------------------------------------|
| grouped       | llama        | rotated pairs as neighbours: the rows of q and k in that order |
| with q-k norm | qwen3        | nothing: pairs in halves, as ours                              |
| latent        | deepseek2    | neighbours; kv_b_proj cut in two, its key half transposed      |

What llama.cpp would compute otherwise than we do is refused.
Dimensions: H heads, R latent width, N, E and V widths of a head without and with position and of a
value.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from tinyllm.errors import DataError
from tinyllm.export.families import Family, misfits, spell
from tinyllm.export.hf_weights import to_hf
from tinyllm.model.mla import LATENT_EPS
from tinyllm.model.sizes import ModelConfig

Architecture = Literal["llama", "qwen3", "deepseek2"]
_ARCHITECTURES: dict[Family, Architecture] = {
    "llama": "llama",
    "qwen3": "qwen3",
    "deepseek_v3": "deepseek2",
}
_TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_KV_B = "self_attn.kv_b_proj"


def gguf_refusal(config: ModelConfig) -> str | None:
    """Return why llama.cpp cannot be this model, and what it would take; None: it can."""
    missing = {family: dict(misfits(config)[family]) for family in _ARCHITECTURES}
    if config.window is not None:
        missing["qwen3"]["window"] = None  # llama.cpp's qwen3 has no window and says nothing
    nearest = min(missing, key=lambda family: len(missing[family]))
    if missing[nearest]:
        return (
            f"llama.cpp has no such architecture; the nearest, {_ARCHITECTURES[nearest]}, would"
            f" need {spell(missing[nearest])}"
        )
    if config.mla is None:
        return None
    if config.rope_scaling.kind == "linear":  # it would sharpen the softmax as for yarn
        return (
            "llama.cpp has no linear rotary scaling in deepseek2; it would need"
            " model.rope_scaling.kind=yarn or none"
        )
    lite = config.n_layers in (26, 27) or (config.n_layers, config.vocab_size) == (48, 128_256)
    if lite and config.mla.q_rank is not None:
        return (
            f"llama.cpp takes {config.n_layers} blocks for DeepSeek-V2-Lite, which has no latent of"
            " the queries; it would need model.mla.q_rank=null or another model.n_layers"
        )
    return None


def architecture_of(config: ModelConfig) -> Architecture:
    """Return llama.cpp's name of the architecture.

    Raises:
        DataError: it has none; the message says what would work.
    """
    if reason := gguf_refusal(config):
        raise DataError(f"GGUF: {reason}")
    return next(_ARCHITECTURES[f] for f, m in misfits(config).items() if not m)


def gguf_sizes(config: ModelConfig) -> dict[str, Any]:
    """Return the sizes under llama.cpp's names, without the architecture before them."""
    sizes: dict[str, Any] = {
        "context_length": config.max_seq_len,
        "embedding_length": config.d,
        "block_count": config.n_layers,
        "feed_forward_length": config.d_ff,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.d_head,
        "attention.value_length": config.d_head,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.d_rope,
        "rope.freq_base": config.rope_base,
    }
    scaling = config.rope_scaling
    if scaling.kind != "none":
        sizes |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if scaling.kind == "yarn":
        sizes["rope.scaling.original_context_length"] = scaling.original_len
    return sizes if config.mla is None else sizes | _latent_sizes(config)


def _latent_sizes(config: ModelConfig) -> dict[str, Any]:
    """Return those of latent attention, which llama.cpp always absorbs: one head of keys R + E."""
    mla = config.mla
    assert mla is not None
    sizes: dict[str, Any] = {
        "attention.head_count_kv": 1,
        "attention.key_length": mla.kv_rank + mla.d_rope,
        "attention.value_length": mla.kv_rank,
        "attention.key_length_mla": mla.d_nope + mla.d_rope,
        "attention.value_length_mla": mla.d_v,
        "attention.kv_lora_rank": mla.kv_rank,
        "attention.q_lora_rank": mla.q_rank or 0,
        # experts that no block has; the keys are mandatory
        "leading_dense_block_count": config.n_layers,
        "expert_feed_forward_length": config.d_ff,
        "expert_shared_count": 0,
    }
    if config.rope_scaling.kind == "yarn":
        # YaRN's factor on all of a score: mscale_all_dim = 1, written as a tenth of it
        sizes["rope.scaling.yarn_log_multiplier"] = 0.1
    return sizes


def gguf_tensors(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return our tensors under llama.cpp's names and in its layout, in our order.

    Args:
        state: of the model; a tied head is left out.
        config: its sizes; one that `architecture_of` takes.
    """
    if config.mla is not None:
        hf = to_hf(state, config, "deepseek_v3")  # rotated pairs as neighbours there too
        state = {name.removeprefix("model."): w for name, w in hf.items()}
    tensors: dict[str, Tensor] = {}
    for name, w in state.items():
        layer, _, kind = name.rpartition(".")
        if layer in _TOP:
            tensors[f"{_TOP[layer]}.{kind}"] = w
            continue
        _, index, inner = layer.split(".", 2)
        if inner == _KV_B:
            tensors |= {f"blk.{index}.{n}.weight": half for n, half in _halves(w, config).items()}
        else:
            tensors[f"blk.{index}.{_BLOCK[inner]}.{kind}"] = _laid_out(inner, w, config)
    return tensors


def _laid_out(inner: str, w: Tensor, config: ModelConfig) -> Tensor:
    """Return one tensor of a block with its rows as llama.cpp wants them."""
    if config.mla is None:
        heads = {"self_attn.q_proj": config.n_heads, "self_attn.k_proj": config.n_kv_heads}
        if inner in heads and not config.qk_norm:
            return neighbours(w, heads[inner])
        return w
    if config.norm_eps == LATENT_EPS or not inner.endswith(("q_a_proj", "kv_a_proj_with_mqa")):
        return w
    # llama.cpp has one epsilon for all norms. With x scaled by s, s x / rms(s x, eps) is
    # x / rms(x, eps / s^2), so s = sqrt(norm_eps / LATENT_EPS) keeps the latents' own.
    n_latent = len(w) if inner.endswith("q_a_proj") else config.mla.kv_rank
    w = w.clone()
    w[:n_latent] *= math.sqrt(config.norm_eps / LATENT_EPS)
    return w


def neighbours(w: Tensor, n_heads: int) -> Tensor:
    """Return the rows of every head with the two of a rotated pair beside each other.

    Row i of the first half, then row i of the second: 0 2 1 3 of a head of four.
    """
    return w.view(n_heads, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)


def _halves(w: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """Cut kv_b_proj, (H (N + V), R), into what the query and what the result is multiplied by."""
    assert config.mla is not None
    w_HXR = w.view(config.n_heads, -1, config.mla.kv_rank)
    keys, values = torch.split(w_HXR, [config.mla.d_nope, config.mla.d_v], dim=1)
    return {"attn_k_b": keys.mT, "attn_v_b": values}  # (H, R, N) and (H, V, R)
