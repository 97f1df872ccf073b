import pytest
import torch
from transformers_twin import transformers_model

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


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_logits_equal_transformers(n_kv_heads, qk_norm, tie_embeddings):
    c = config(n_kv_heads=n_kv_heads, qk_norm=qk_norm, tie_embeddings=tie_embeddings)
    ours = build_model(c, seed=3).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters():  # also norms and an untied head: no neutral values
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    theirs = transformers_model(ours)
    ids = torch.randint(0, c.vocab_size, (3, 33), generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=TOLERANCE, rtol=0)
