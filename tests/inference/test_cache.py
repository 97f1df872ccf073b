import pytest
import torch
from tiny_lm import VOCAB, tiny_config, tiny_model

from tinyllm.errors import DataError
from tinyllm.inference.cache import KVCache
from tinyllm.inference.stored import Stored
from tinyllm.model.sizes import MlaSizes
from tinyllm.ops.reference import quantize_per_row

LATENT = {
    "mla": MlaSizes(q_rank=None, kv_rank=24, d_nope=8, d_rope=4, d_v=12),
    **{"d_head": 12, "qk_norm": False, "n_kv_heads": 4},
}


def cached_logits(model, ids_BT, chunks, dtype=None):
    cache = KVCache(
        model.config,
        ids_BT.shape[0],
        ids_BT.shape[1],
        dtype or model.embed_tokens.weight.dtype,
        "cpu",
    )
    parts, start = [], 0
    for size in chunks:
        parts.append(model(ids_BT[:, start : start + size], cache=cache))
        start += size
    assert start == ids_BT.shape[1] == cache.length
    return torch.cat(parts, dim=1)


@torch.inference_mode()
@pytest.mark.parametrize("chunks", [[1] * 24, [24], [10] + [1] * 14, [7, 9, 8], [1, 23], [23, 1]])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_cached_decode_equals_full_forward(chunks, n_kv_heads):
    model = tiny_model(n_kv_heads=n_kv_heads)
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    full, cached = model(ids), cached_logits(model, ids, chunks)
    exact = model.double()(ids)
    # the full pass's own rounding, measured against fp64, is the yardstick
    tolerance = 2 * (full - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert tolerance < 1e-4 * exact.abs().max()
    assert (cached - exact).abs().max() <= tolerance


@torch.inference_mode()
def test_bf16_cache_is_close_and_half_the_size():
    model = tiny_model()
    ids = torch.randint(0, VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))
    full = model(ids)
    rounded = cached_logits(model, ids, [1] * 24, torch.bfloat16)
    # keys and values keep 8 bits: relative error 2^-9 each, twice per layer
    assert 0 < (rounded - full).abs().max() < 4 * model.config.n_layers * 2**-9 * full.abs().max()
    sizes = [
        KVCache.n_bytes(model.config, 1, 24, dtype) for dtype in (torch.float32, torch.bfloat16)
    ]
    assert sizes == [2 * 2 * 2 * 8 * 24 * 4, 2 * 2 * 2 * 8 * 24 * 2]


class Rounded:
    """What an INT8 cache is by definition: whole rows of fp32, rounded when they come."""

    def __init__(self, model):
        self._model, self.layers = model, [self.Layer() for _ in model.layers]
        self._length = 0

    def plan(self, n_tokens):
        start, self._length = self._length, self._length + n_tokens
        positions = torch.arange(start, self._length)
        return positions, torch.arange(self._length) <= positions[:, None]

    class Layer:
        def __init__(self):
            self.parts = [], []

        def append(self, *new):
            for part, x in zip(self.parts, new, strict=True):
                q, scale = quantize_per_row(x)
                part.append(q * scale[..., None])
            return tuple(torch.cat(part, dim=2) for part in self.parts)


@torch.inference_mode()
@pytest.mark.parametrize("chunks", [[1] * 24, [10] + [1] * 14, [7, 9, 8]])
@pytest.mark.parametrize("kind", [{}, LATENT], ids=["grouped", "latent"])
def test_int8_cache_is_the_rounded_one_and_close(kind, chunks):
    model = tiny_model(**kind)
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    ours, by_hand = cached_logits(model, ids, chunks, torch.int8), Rounded(model)
    parts = [model(part, cache=by_hand) for part in ids.split(chunks, dim=1)]
    torch.testing.assert_close(ours, torch.cat(parts, dim=1), rtol=1e-4, atol=1e-4)
    # a row's numbers are at most half a step off, 1/254 of the largest, twice per layer
    full = model(ids)
    assert 0 < (ours - full).abs().max() < 4 * model.config.n_layers / 254 * full.abs().max()


def test_int8_takes_half_of_bf16_and_the_scales():
    config = tiny_config(d_head=64)
    bf16, int8 = (KVCache.n_bytes(config, 3, 16, t) for t in (torch.bfloat16, torch.int8))
    rows = 2 * config.n_layers * config.n_kv_heads * 3 * 16
    assert int8 == bf16 / 2 + 4 * rows == rows * 68


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_stored_bytes_are_as_told(dtype):
    cache = KVCache(tiny_config(), 3, 16, dtype, "cpu")
    tensors = [t for layer in cache.layers for part in layer.memory for t in part.tensors]
    assert sum(t.nbytes for t in tensors) == KVCache.n_bytes(tiny_config(), 3, 16, dtype)


def test_plan_makes_no_mask_where_none_is_needed():
    model = tiny_model()
    cache = KVCache(model.config, 1, 16, torch.float32, "cpu")
    positions, mask = cache.plan(4)
    assert (positions.tolist(), mask) == ([0, 1, 2, 3], None)
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3, 4]]), cache=cache)
    positions, mask = cache.plan(1)
    assert (positions.tolist(), mask) == ([4], None)
    positions, mask = cache.plan(2)
    assert positions.tolist() == [4, 5]
    assert mask.tolist() == [[True] * 5 + [False], [True] * 6]


@torch.inference_mode()
def test_truncate_goes_back_in_time():
    model = tiny_model()
    cache = KVCache(model.config, 1, 16, torch.float32, "cpu")
    model(torch.tensor([[1, 2, 3, 4]]), cache=cache)
    first = model(torch.tensor([[5]]), cache=cache)
    model(torch.tensor([[6, 7]]), cache=cache)
    cache.truncate(4)
    assert torch.equal(model(torch.tensor([[5]]), cache=cache), first)


@torch.inference_mode()
def test_overflow_is_told_in_one_line():
    model = tiny_model()
    cache = KVCache(model.config, 1, 4, torch.float32, "cpu")
    model(torch.tensor([[1, 2, 3]]), cache=cache)
    with pytest.raises(DataError, match="5 tokens do not fit into a cache of 4"):
        model(torch.tensor([[1, 2]]), cache=cache)
    with pytest.raises(DataError, match="cache of 49 tokens is longer than .* 48"):
        KVCache(model.config, 1, 49, torch.float32, "cpu")


def test_stored_numbers_of_another_format_are_refused():
    int8, bf16 = (Stored.zeros(2, 5, 8, dtype=t) for t in (torch.int8, torch.bfloat16))
    with pytest.raises(ValueError, match="zip"):
        bf16[:, :3] = int8[:, :3]
    with pytest.raises(ValueError, match="zip"):
        int8[:, :3] = bf16[:, :3]
