import copy

import pytest
import torch
from tiny_lm import cached_logits, tiny_model

from tinyllm.artifact import build_artifact
from tinyllm.model.directory import load_config
from tinyllm.ops import cpu
from tinyllm.ops.decoder import Decoder
from tinyllm.ops.int4 import dequantize_groups, quantize_groups
from tinyllm.ops.linear import (
    bind_linear_w4a8,
    bind_linear_w8a8,
    in_two_terms,
    quantize_per_row,
)
from tinyllm.quantization.directory import save_quantized_model
from tinyllm.quantization.int8 import quantize_model
from tinyllm.quantization.load import load_any_model
from tinyllm.quantization.transformer import NOT_HERE

IDS = torch.arange(40).view(2, 20)


def weight(bits, n=30, k=64):
    """A rounded weight as a function, and its exact value."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    if bits == 4:
        q, scale = quantize_groups(w)
        return bind_linear_w4a8(q, scale), dequantize_groups(q, scale).double()
    q, scale = quantize_per_row(w)
    return bind_linear_w8a8(q, scale), q.double() * scale.double()[:, None]


@pytest.mark.parametrize("bits", [8, 4])
def test_two_terms_leave_what_sixteen_bits_leave(bits):
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(2))
    bound, exact = weight(bits)
    y = in_two_terms(bound)(x).double()
    absmax = x.abs().amax(-1, keepdim=True).double()
    # each input is off by half a step of the second term; fp32 rounds a few products besides
    allowed = absmax * exact.abs().sum(-1) * (1 / 64516 + 8 * 2.0**-24)
    assert bool(((y - x.double() @ exact.T).abs() <= allowed).all())
    one_term = bound(x).double() - x.double() @ exact.T
    two_terms = y - x.double() @ exact.T
    assert two_terms.norm() < one_term.norm() / 150  # 254, but for rows whose rest is large


def test_what_is_not_a_number_stays_so_and_zero_stays_zero():
    bound, _ = weight(8)
    x = torch.zeros(3, 64)
    x[1, 5], x[2] = float("inf"), 1.0
    y = in_two_terms(bound)(x)
    assert not y[0].any()
    assert y[1].isnan().all()
    assert y[2].isfinite().all()


@pytest.mark.parametrize("weight_bits", [8, 4])
def test_one_native_call_equals_layer_by_layer(monkeypatch, weight_bits):
    if cpu.load()[0] is None:
        pytest.skip("no native kernels here")
    model = quantize_model(tiny_model(), weight_bits=weight_bits, activation_bits=16)
    ids = list(range(40, 70))
    native = cached_logits(model, ids)
    assert isinstance(model._prepared, Decoder)
    plain = copy.deepcopy(model)
    monkeypatch.setenv("TINYLLM_KERNELS", "reference")
    layered = cached_logits(plain, ids)
    assert plain._prepared == NOT_HERE
    assert (native - layered).norm() / layered.norm() < 5e-5  # 8 bits: 5e-3, a step is 254 times it


@torch.inference_mode()
def test_only_the_error_of_the_weights_is_left():
    model = tiny_model()
    exact_inputs = copy.deepcopy(model)
    for name, layer in quantize_model(model).named_modules():
        rounded = getattr(layer, "weight_q", None)
        if rounded is not None and not getattr(layer, "is_rotated", False):
            weight = rounded * layer.weight_scale[:, None]
            exact_inputs.get_submodule(name).weight = torch.nn.Parameter(weight)
    rotated = [f"layers.{i}.mlp.down_proj" for i in range(len(model.layers))]
    expected = exact_inputs(IDS)
    errors = {}
    for bits in (8, 16):
        found = quantize_model(model, activation_bits=bits)
        for name in rotated:  # exact on both sides
            found.get_submodule(name.rpartition(".")[0]).down_proj = model.get_submodule(name)
        errors[bits] = ((found(IDS) - expected).norm() / expected.norm()).item()
    assert errors[8] > 3e-3
    assert errors[16] < errors[8] / 150


def test_a_directory_keeps_the_bits(tmp_path):
    model = quantize_model(tiny_model(), activation_bits=16)
    with build_artifact(tmp_path / "a16", kind="int8", made_from=[]) as draft:
        save_quantized_model(model, draft.path)
    assert load_config(tmp_path / "a16")[1] == "int8-rotated-a16"
    loaded = load_any_model(tmp_path / "a16")
    with torch.inference_mode():
        assert torch.equal(loaded(IDS), model(IDS))
        assert not torch.equal(loaded(IDS), quantize_model(tiny_model())(IDS))


def test_layers_of_several_kinds_go_one_by_one():
    model, other = (quantize_model(tiny_model(), activation_bits=bits) for bits in (16, 8))
    model.layers[0].mlp.up_proj = other.layers[0].mlp.up_proj
    assert cached_logits(model, list(range(8))).isfinite().all()
    assert model._prepared == NOT_HERE
