import copy

import pytest
import torch
from tiny_lm import tiny_model

from tinyllm.inference.cache import KVCache
from tinyllm.ops import cpu
from tinyllm.quantization.block import NOT_HERE, Int8Block
from tinyllm.quantization.int8 import quantize_model

PROMPT = [5, 17, 33, 90, 2, 41]


@pytest.fixture(params=[True, False], ids=["qk_norm", "plain"])
def model(request):
    return quantize_model(tiny_model(qk_norm=request.param))


def cached_logits(model, ids, batch=1, dtype=torch.float32):
    cache = KVCache(model.config, batch, 48, dtype, "cpu")
    rows = []
    with torch.inference_mode():
        rows.append(model(torch.tensor([ids[:6]] * batch), cache=cache)[:, -1:])
        rows += [model(torch.tensor([[token]] * batch), cache=cache) for token in ids[6:]]
    return torch.cat(rows, dim=1)


def prepared(model):
    return [block._prepared for block in model.layers]


def test_decoding_block_by_block_equals_layer_by_layer(model, monkeypatch):
    if cpu.load()[0] is None:
        pytest.skip("no native kernels here")
    ids = [*PROMPT, *range(40, 70)]
    fused = cached_logits(model, ids)
    assert all(type(p).__name__ == "DecodeBlock" for p in prepared(model))
    plain = copy.deepcopy(model)  # with nothing prepared
    monkeypatch.setenv("TINYLLM_KERNELS", "reference")
    layered = cached_logits(plain, ids)
    assert prepared(plain) == [NOT_HERE] * 2
    # The same up to fp32 rounding, but where an activation rounds to the next of 254 steps.
    assert (fused - layered).norm() / layered.norm() < 5e-3
    with torch.inference_mode():
        full = plain(torch.tensor([ids]))[:, 5:]
    assert (fused - full).norm() / full.norm() < 5e-3


def test_a_narrow_cache_and_several_rows_work(model):
    ids = [*PROMPT, 7, 8, 9]
    one = cached_logits(model, ids)
    torch.testing.assert_close(cached_logits(model, ids, batch=2)[1:], one, rtol=0.05, atol=0.05)
    narrow = cached_logits(model, ids, dtype=torch.bfloat16)
    assert (narrow - one).norm() / one.norm() < 0.05


def test_only_blocks_that_are_int8_throughout_decode_as_a_whole():
    whole, part = quantize_model(tiny_model()), quantize_model(tiny_model(), {"q_proj", "up_proj"})
    assert all(isinstance(block, Int8Block) for block in whole.layers)
    assert not any(isinstance(block, Int8Block) for block in part.layers)


def test_a_moved_loaded_or_copied_block_prepares_anew(model):
    if cpu.load()[0] is None:
        pytest.skip("no native kernels here")
    ids = [*PROMPT, 1]
    expected = cached_logits(model, ids)
    clone = copy.deepcopy(model)
    assert prepared(clone) == [None, None]
    assert torch.equal(cached_logits(clone, ids), expected)
    other = quantize_model(tiny_model(seed=5, qk_norm=clone.layers[0].self_attn.q_norm is not None))
    if set(other.state_dict()) == set(clone.state_dict()):
        clone.load_state_dict(other.state_dict())
        assert torch.equal(cached_logits(clone, ids), cached_logits(other, ids))
    assert torch.equal(cached_logits(model.to("cpu"), ids), expected)


def test_autocast_goes_layer_by_layer(model):
    with torch.autocast("cpu", torch.bfloat16):
        logits = cached_logits(model, [*PROMPT, 3])
    assert prepared(model) == [None, None]
    assert logits.isfinite().all()
