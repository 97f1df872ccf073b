"""Tensors under our names and under those of `transformers`, in both directions.

Llama, Qwen3: ours are theirs below `model.`. DeepSeek-V3 pairs the rotated channels as neighbours
(2i, 2i + 1), we as halves (i, i + E/2): the rows that make them are reordered. GPT-2 keeps q, k and
v in one matrix, and every matrix transposed.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tinyllm.export.families import Family
from tinyllm.model.sizes import ModelConfig

HEAD = "lm_head.weight"
_GPT2_LAYER = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_GPT2_TOP = {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"}
_QKV = ("q_proj", "k_proj", "v_proj")


def to_hf(state: Mapping[str, Tensor], config: ModelConfig, family: Family) -> dict[str, Tensor]:
    """Return our tensors under the names and in the layout of a class of transformers."""
    if family == "gpt2":
        return _to_gpt2(state, config.n_layers)
    state = _rearranged(state, config, _neighbours)
    return {name if name == HEAD else f"model.{name}": w for name, w in state.items()}


def from_hf(
    tensors: Mapping[str, Tensor], config: ModelConfig, family: Family
) -> dict[str, Tensor]:
    """Return a checkpoint's tensors under our names and in our layout.

    What is computed there and not learned (rotary tables, GPT-2's causal masks) is left out, and so
    is the head if it is tied.
    """
    if family == "gpt2":
        state = _from_gpt2(tensors)
    else:
        state = {name.removeprefix("model."): w for name, w in tensors.items()}
        state = {name: w for name, w in state.items() if not name.endswith("rotary_emb.inv_freq")}
        interleaved = {name: w.clone() for name, w in state.items()}
        state = _rearranged(interleaved, config, _halves)
    if config.tie_embeddings:
        state.pop(HEAD, None)
    return state


def adapter_to_hf(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return an adapter's matrices for the layout of a class of transformers.

    The rows of B are those of the layer, so they follow its order; A stays as it is.

    Args:
        tensors: A and B of each layer under peft's names.
        config: the base's sizes; not those of GPT-2.
    """
    rows = _rotated_rows(config, _neighbours)
    ordered = {}
    for name, w in tensors.items():
        layer, which = name.split(".")[-3:-1]
        ordered[name] = w[rows[layer]] if which == "lora_B" and layer in rows else w
    return ordered


def _rearranged(
    state: Mapping[str, Tensor], config: ModelConfig, order: Callable[[int], Tensor]
) -> dict[str, Tensor]:
    """Return the tensors with the rows of rotated channels in another order."""
    rows = _rotated_rows(config, order)
    return {
        name: w[rows[layer]] if (layer := name.split(".")[-2]) in rows else w
        for name, w in state.items()
    }


def _rotated_rows(config: ModelConfig, order: Callable[[int], Tensor]) -> dict[str, Tensor]:
    """Return the new order of the rows of each layer that makes rotated channels; gqa has none."""
    if config.mla is None:
        return {}
    d_nope, d_rope = config.mla.d_nope, config.mla.d_rope
    head = torch.cat((torch.arange(d_nope), d_nope + order(d_rope)))
    queries = torch.cat([i * len(head) + head for i in range(config.n_heads)])
    latent = torch.cat((torch.arange(config.mla.kv_rank), config.mla.kv_rank + order(d_rope)))
    return {"q_proj": queries, "q_b_proj": queries, "kv_a_proj_with_mqa": latent}


def _neighbours(n: int) -> Tensor:
    """Return where each channel of the interleaved order stands in halves; 4: [0, 2, 1, 3]."""
    return torch.arange(n).view(2, n // 2).T.flatten()


def _halves(n: int) -> Tensor:
    """Return where each channel of the halves stands among neighbours; 6: [0, 2, 4, 1, 3, 5]."""
    return torch.arange(n).view(n // 2, 2).T.flatten()


def _to_gpt2(state: Mapping[str, Tensor], n_layers: int) -> dict[str, Tensor]:
    named = {}
    for name, w in state.items():
        if name == HEAD:
            named[HEAD] = w
            continue
        layer, _, kind = name.rpartition(".")
        if not layer.startswith("layers."):
            named[f"transformer.{_GPT2_TOP[layer]}.{kind}"] = w
            continue
        _, index, inner = layer.split(".", 2)
        if inner in _GPT2_LAYER:
            matrix = w.T.contiguous() if w.ndim == 2 else w
            named[f"transformer.h.{index}.{_GPT2_LAYER[inner]}.{kind}"] = matrix
    for i in range(n_layers):
        for kind in ("weight", "bias"):
            joined = torch.cat([state[f"layers.{i}.self_attn.{part}.{kind}"] for part in _QKV])
            matrix = joined.T.contiguous() if joined.ndim == 2 else joined
            named[f"transformer.h.{i}.attn.c_attn.{kind}"] = matrix
    return named


def _from_gpt2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours = {theirs: name for name, theirs in (_GPT2_TOP | _GPT2_LAYER).items()}
    state = {}
    for full, w in tensors.items():
        name = full.removeprefix("transformer.")
        layer, _, kind = name.rpartition(".")
        if not layer.startswith("h."):
            state[f"{ours[layer]}.{kind}" if layer in ours else name] = w
            continue
        _, index, inner = layer.split(".", 2)
        matrix = w.T.contiguous() if w.ndim == 2 else w
        if inner == "attn.c_attn":
            for part, piece in zip(_QKV, matrix.chunk(3), strict=True):
                state[f"layers.{index}.self_attn.{part}.{kind}"] = piece.contiguous()
        elif inner in ours:
            state[f"layers.{index}.{ours[inner]}.{kind}"] = matrix
        elif inner != "attn":  # `attn.bias` and `attn.masked_bias` are masks
            state[name] = w
    return state
