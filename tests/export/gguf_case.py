"""Small models of every shape that GGUF takes."""

import dataclasses

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
