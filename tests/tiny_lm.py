"""A real tiny model whose greedy text wanders, for tests."""

import torch

from tinyllm.inference.cache import KVCache
from tinyllm.model.init import build_model
from tinyllm.model.sizes import ModelConfig
from tinyllm.model.transformer import Transformer

VOCAB = 97


def tiny_config(**changes) -> ModelConfig:
    sizes = {
        "vocab_size": VOCAB,
        "d": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_head": 8,
        "d_ff": 64,
        "qk_norm": True,
        "tie_embeddings": False,
        "rope_base": 10000.0,
        "norm_eps": 1e-6,
        "max_seq_len": 48,
    }
    return ModelConfig(**{**sizes, **changes})


def tiny_model(seed: int = 0, **changes) -> Transformer:
    model = build_model(tiny_config(**changes), seed)
    with torch.no_grad():  # a tied or zero head repeats one token; a wide one depends on the past
        model.lm_head.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def cached_logits(model: Transformer, ids: list[int], batch: int = 1, dtype=torch.float32):
    """The logits from the sixth token on: six are read at once, the others one by one."""
    cache = KVCache(model.config, batch, 48, dtype, "cpu")
    with torch.inference_mode():
        rows = [model(torch.tensor([ids[:6]] * batch), cache=cache)[:, -1:]]
        rows += [model(torch.tensor([[token]] * batch), cache=cache) for token in ids[6:]]
    return torch.cat(rows, dim=1)
