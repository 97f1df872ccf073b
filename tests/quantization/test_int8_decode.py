import copy

import pytest
import torch
from tiny_lm import cached_logits, tiny_model

from tinyllm.inference.cache import KVCache
from tinyllm.inference.slots import SlotCache
from tinyllm.ops import cpu
from tinyllm.ops.decoder import Decoder
from tinyllm.quantization.int8 import quantize_model
from tinyllm.quantization.transformer import NOT_HERE

PROMPT = [5, 17, 33, 90, 2, 41]


@pytest.fixture(params=[True, False], ids=["qk_norm", "plain"])
def model(request):
    return quantize_model(tiny_model(qk_norm=request.param))


@pytest.mark.parametrize("stored", [torch.float32, torch.int8])
def test_one_native_call_equals_layer_by_layer(model, monkeypatch, stored):
    if cpu.load()[0] is None:
        pytest.skip("no native kernels here")
    ids = [*PROMPT, *range(40, 70)]
    native = cached_logits(model, ids, dtype=stored)
    assert isinstance(model._prepared, Decoder)
    plain = copy.deepcopy(model)  # with nothing prepared
    monkeypatch.setenv("TINYLLM_KERNELS", "reference")
    layered = cached_logits(plain, ids, dtype=stored)
    assert plain._prepared == NOT_HERE
    # The same up to fp32 rounding, but where a number rounds to the next of 254 steps.
    assert (native - layered).norm() / layered.norm() < 5e-3
    if stored is torch.int8:
        return
    with torch.inference_mode():
        full = plain(torch.tensor([ids]))[:, 5:]
    assert (native - full).norm() / full.norm() < 5e-3


def test_slots_and_batches_give_the_same_bits_as_one_sequence(model):
    if cpu.load()[0] is None:
        pytest.skip("no native kernels here")
    ids = [*PROMPT, 7, 8, 9]
    one = cached_logits(model, ids)
    assert torch.equal(cached_logits(model, ids, batch=2)[1:], one)
    slots = SlotCache(model.config, 3, torch.float32, "cpu")
    with torch.inference_mode():
        for slot, n in ((0, 6), (2, 7)):
            model.hidden(torch.tensor([ids[:n]]), cache=slots.rows(slot, [0]))
        step = torch.tensor([[ids[6]], [0], [ids[7]]])
        logits = model.next_logits(step, slots.rows(0, [6, 0, 7]))
    assert torch.equal(logits[0], one[0, 1])
    assert torch.equal(logits[2], one[0, 2])


@torch.inference_mode()
def test_both_ways_leave_the_same_int8_cache(model, monkeypatch):
    """A cache that one way filled may be read by the other."""
    if cpu.load()[0] is None:
        pytest.skip("no native kernels here")
    native, layered = (KVCache(model.config, 1, 48, torch.int8, "cpu") for _ in range(2))
    model.hidden(torch.tensor([PROMPT]), cache=native)
    assert isinstance(model._prepared, Decoder)
    monkeypatch.setenv("TINYLLM_KERNELS", "reference")
    copy.deepcopy(model).hidden(torch.tensor([PROMPT]), cache=layered)
    for kept, expected in zip(native.memory(), layered.memory(), strict=True):
        for one, other in zip(kept, expected, strict=True):
            numbers, close = other.to(torch.float32), one.to(torch.float32)
            assert (close - numbers).norm() / numbers.norm() < 5e-3


def test_narrow_caches_work(model):
    ids = [*PROMPT, 7, 8, 9]
    one = cached_logits(model, ids)
    for dtype in (torch.bfloat16, torch.int8, torch.float16):  # the last one layer by layer
        narrow = cached_logits(model, ids, dtype=dtype)
        assert (narrow - one).norm() / one.norm() < 0.05


@pytest.mark.parametrize(
    "model",
    [
        quantize_model(tiny_model(), {"q_proj", "up_proj"}),
        quantize_model(tiny_model(norm="layernorm")),
        quantize_model(tiny_model(ffn="gelu")),
        quantize_model(tiny_model(positions="learned")),
    ],
    ids=["in part", "layernorm", "gelu", "learned positions"],
)
def test_other_models_go_layer_by_layer(model):
    logits = cached_logits(model, [*PROMPT, 3])
    assert model._prepared == NOT_HERE
    assert logits.isfinite().all()


def test_a_window_narrower_than_the_text_is_kept(monkeypatch):
    if cpu.load()[0] is None:
        pytest.skip("no native kernels here")
    model = quantize_model(tiny_model(window=4, window_layers=(0,)))
    ids = [*PROMPT, *range(40, 60)]
    native = cached_logits(model, ids)
    assert isinstance(model._prepared, Decoder)
    monkeypatch.setenv("TINYLLM_KERNELS", "reference")
    layered = cached_logits(copy.deepcopy(model), ids)
    assert (native - layered).norm() / layered.norm() < 5e-3


def test_a_moved_loaded_or_copied_model_prepares_anew(model):
    if cpu.load()[0] is None:
        pytest.skip("no native kernels here")
    ids = [*PROMPT, 1]
    expected = cached_logits(model, ids)
    clone = copy.deepcopy(model)
    assert clone._prepared is None
    assert torch.equal(cached_logits(clone, ids), expected)
    other = quantize_model(tiny_model(seed=5, qk_norm=model.config.qk_norm))
    clone.load_state_dict(other.state_dict())
    assert torch.equal(cached_logits(clone, ids), cached_logits(other, ids))
    assert torch.equal(cached_logits(model.to("cpu"), ids), expected)


def test_autocast_goes_layer_by_layer(model):
    with torch.autocast("cpu", torch.bfloat16):
        logits = cached_logits(model, [*PROMPT, 3])
    assert model._prepared is None
    assert logits.isfinite().all()
