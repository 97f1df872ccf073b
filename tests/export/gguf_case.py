"""Small models of every shape that GGUF takes, and what their files must hold."""

import dataclasses

import gguf
from export_case import write_clean, write_model

from tinyllm.export.families import family_of
from tinyllm.export.gguf_layout import architecture_of
from tinyllm.export.hf_weights import to_hf
from tinyllm.model.directory import load_config, load_weights
from tinyllm.model.sizes import MlaSizes, RopeScaling

MLA = MlaSizes(q_rank=None, kv_rank=32, d_nope=8, d_rope=6, d_v=12)
LATENT = {"mla": MLA, "d_head": 14, "qk_norm": False, "n_kv_heads": 4}
LOW_RANK = {**LATENT, "mla": dataclasses.replace(MLA, q_rank=16)}
YARN = {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_len=16)}
LINEAR = {"rope_scaling": RopeScaling(kind="linear", factor=2.0, original_len=32)}
FORMS = {
    "llama": {"qk_norm": False, "rope_base": 500.0},
    "llama, multi-query, linear, tied": {
        **{"qk_norm": False, "n_kv_heads": 1, "tie_embeddings": True},
        **LINEAR,
    },
    "qwen3, tied": {"tie_embeddings": True},
    "qwen3, yarn": {**YARN, "norm_eps": 1e-5},
    "deepseek2": LATENT,
    "deepseek2, other epsilon": {**LATENT, "norm_eps": 1e-2},
    "deepseek2, low-rank query, yarn": {**LOW_RANK, **YARN, "norm_eps": 1e-5},
}


def write_forms(folder):
    """Write a model directory per form; return the folder."""
    write_clean(folder / "clean")
    for name, changes in FORMS.items():
        write_model(folder / name, folder / "clean", **changes)
    return folder


def permuted(w, n_heads):
    """llama.cpp's conversion script does this to q and k of a Llama."""
    return w.reshape(n_heads, 2, w.shape[0] // n_heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def expected_tensors(source):
    """The weights under the names that the gguf package gives to those of transformers."""
    config, _ = load_config(source)
    weights = to_hf(load_weights(source), config, family_of(config))
    architecture = {name: a for a, name in gguf.MODEL_ARCH_NAMES.items()}[architecture_of(config)]
    names = gguf.get_tensor_name_map(architecture, config.n_layers)
    tensors = {}
    for hf, weight in weights.items():
        name, w = names.get_name(hf, try_suffixes=(".weight",)), weight.double().numpy()
        if name.endswith("attn_kv_b.weight"):
            heads = w.reshape(config.n_heads, -1, w.shape[1])
            keys, values = heads[:, : config.mla.d_nope], heads[:, config.mla.d_nope :]
            tensors[name.replace("kv_b", "k_b")] = keys.swapaxes(1, 2)
            tensors[name.replace("kv_b", "v_b")] = values
        elif architecture == gguf.MODEL_ARCH.LLAMA and name.endswith(("attn_q.weight", "k.weight")):
            heads = config.n_heads if "attn_q" in name else config.n_kv_heads
            tensors[name] = permuted(w, heads)
        else:
            tensors[name] = w
        if config.mla and name.endswith(("attn_kv_a_mqa.weight", "attn_q_a.weight")):
            n_latent = config.mla.kv_rank if "kv_a" in name else len(w)
            tensors[name][:n_latent] *= (config.norm_eps / 1e-6) ** 0.5
    return tensors
