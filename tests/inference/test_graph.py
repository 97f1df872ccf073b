"""A step of fixed shapes makes the logits of the growing cache; a card replays it as a graph.

tests/cuda/test_decode_step.py has the same step with our kernel.
"""

import pytest
import torch
from tiny_lm import VOCAB, tiny_model

from tinyllm.inference.cache import KVCache
from tinyllm.inference.generate import generate
from tinyllm.inference.graph import DecodeStep
from tinyllm.inference.sampling import SamplingParams
from tinyllm.model.sizes import MlaSizes

IDS = torch.randint(VOCAB, (20,), generator=torch.Generator().manual_seed(3))
KINDS = {
    "standard": {},
    "latent": {
        "mla": MlaSizes(q_rank=None, kv_rank=24, d_nope=8, d_rope=4, d_v=12),
        **{"d_head": 12, "qk_norm": False, "n_kv_heads": 4},
    },
    "window": {"window": 5, "window_layers": (0,)},
    "learned positions": {"positions": "learned"},
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@torch.inference_mode()
def test_logits_are_those_of_the_growing_cache(kind, dtype, backend, monkeypatch):
    monkeypatch.setenv("TINYLLM_KERNELS", backend)
    model = tiny_model(**KINDS[kind])
    grown, fixed = (KVCache(model.config, 1, 24, dtype, "cpu") for _ in range(2))
    for cache in (grown, fixed):
        model.hidden(IDS[None, :4], cache=cache)
    step = DecodeStep(model, fixed.memory())
    for token in IDS[4:]:
        expected = model.head(model.hidden(token.view(1, 1), cache=grown)[:, -1])
        torch.testing.assert_close(
            step(int(token), fixed.reserve(1)), expected, rtol=1e-4, atol=1e-5
        )
    assert fixed.length == grown.length == len(IDS)


@pytest.mark.gpu
def test_on_a_card_text_is_the_same_with_the_graph():
    model = tiny_model().cuda()
    greedy = SamplingParams(max_new_tokens=30)
    with_graph = list(generate(model, [5, 17, 42], greedy, ()))
    assert with_graph == list(generate(model, [5, 17, 42], greedy, (), use_cache=False))
