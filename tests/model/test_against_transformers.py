import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tinyllm.model.init import build_model
from tinyllm.model.sizes import ModelConfig

# |logits| here stay below 4 and pass through about 20 fp32 roundings of 6e-8 relative error
TOLERANCE = 4 * 20 * 6e-8


def config(**changes):
    sizes = {
        "vocab_size": 97,
        "d": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_head": 16,
        "d_ff": 128,
        "qk_norm": False,
        "tie_embeddings": True,
        "rope_base": 1e4,
        "norm_eps": 1e-6,
        "max_seq_len": 64,
    }
    return ModelConfig(**{**sizes, **changes})


def reference(c):
    shared = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.d_head,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
        "max_position_embeddings": c.max_seq_len,
        "tie_word_embeddings": c.tie_embeddings,
    }
    if c.qk_norm:
        return Qwen3ForCausalLM(Qwen3Config(**shared))
    return LlamaForCausalLM(LlamaConfig(**shared))


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_logits_equal_transformers(n_kv_heads, qk_norm, tie_embeddings):
    c = config(n_kv_heads=n_kv_heads, qk_norm=qk_norm, tie_embeddings=tie_embeddings)
    ours, theirs = build_model(c, seed=3).eval(), reference(c).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters():  # also norms and an untied head: no neutral values
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    weights = {
        f"model.{name}": w for name, w in ours.state_dict().items() if name != "lm_head.weight"
    }
    theirs.load_state_dict({**weights, "lm_head.weight": ours.lm_head.weight})
    ids = torch.randint(0, c.vocab_size, (3, 33), generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=TOLERANCE, rtol=0)
