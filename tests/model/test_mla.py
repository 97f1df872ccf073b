import dataclasses

import pytest
import torch
from tiny_lm import VOCAB, tiny_model

from tinyllm.finetune.lora import LoRALinear, add_lora
from tinyllm.inference.cache import KVCache
from tinyllm.inference.generate import generate
from tinyllm.inference.sampling import SamplingParams
from tinyllm.model.mla import LatentAttention
from tinyllm.model.sizes import MlaSizes

SIZES = MlaSizes(q_rank=None, kv_rank=24, d_nope=8, d_rope=4, d_v=12)
LATENT = {"mla": SIZES, "d_head": 12, "qk_norm": False, "n_kv_heads": 4}
LOW_RANK = {**LATENT, "mla": dataclasses.replace(SIZES, q_rank=16)}
either = pytest.mark.parametrize("sizes", [LATENT, LOW_RANK], ids=["full query", "low-rank query"])


def set_absorbing(model, absorbs):
    for block in model.layers:
        assert isinstance(block.self_attn, LatentAttention)
        block.self_attn.absorbs = absorbs
    return model


def cached(model, ids, chunks):
    cache = KVCache(model.config, len(ids), ids.shape[1], torch.float32, "cpu")
    with torch.inference_mode():
        return torch.cat([model(part, cache=cache) for part in ids.split(chunks, dim=1)], dim=1)


@either
@pytest.mark.parametrize("chunks", [[24], [1] * 24, [9, 1, 7, 7]])
def test_absorbed_equals_naive(sizes, chunks):
    model = tiny_model(**sizes)
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    absorbed = cached(set_absorbing(model, True), ids, chunks)
    naive = cached(set_absorbing(model, False), ids, chunks)
    with torch.inference_mode():
        exact = model.double()(ids)
    own = (naive - exact).abs().max()
    assert 0 < own < 1e-4 * exact.abs().max()
    # the same numbers in another order: at most twice what the naive order rounds
    assert (absorbed - exact).abs().max() <= 2 * own + 1e-6 * exact.abs().max()


@either
def test_cached_text_is_the_uncached_text(sizes):
    model = tiny_model(**sizes)
    texts = [
        list(generate(model, [5, 6, 7], SamplingParams(max_new_tokens=40), (), use_cache=cache))
        for cache in (True, False)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 4


def test_the_cache_holds_the_latent_and_the_shared_key_only():
    model = tiny_model(**LATENT)
    cache = KVCache(model.config, 2, 20, torch.float32, "cpu")
    with torch.inference_mode():
        model(torch.ones(2, 3, dtype=torch.long), cache=cache)
    for layer in cache.layers:
        shapes = [tuple(part.numbers.shape) for part in layer.memory]
        assert shapes == [(2, 1, 20, 4), (2, 1, 20, 24)]
    per_head = (
        2 * 4 * 20 * (12 + 12) * 2 * 4
    )  # batch, heads, positions, key and value, layers, fp32
    assert KVCache.n_bytes(model.config, 2, 20, torch.float32) < per_head / 3


def test_a_low_rank_addition_to_the_expansion_is_not_absorbed_away():
    class Shape:
        rank, alpha, dropout, targets = 2, 4.0, 0.0, ("kv_b_proj",)

    model = add_lora(tiny_model(**LATENT), Shape(), seed=0).eval()
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B)
    ids = torch.randint(0, VOCAB, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(cached(model, ids, [1] * 12), model(ids), atol=2e-5, rtol=0)


def test_gradients_reach_every_weight():
    model = tiny_model(**LOW_RANK).train()
    model(torch.ones(1, 6, dtype=torch.long) * torch.arange(6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
