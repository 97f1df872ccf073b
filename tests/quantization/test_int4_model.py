import copy

import pytest
import torch
from tiny_lm import cached_logits, tiny_model

from tinyllm.artifact import build_artifact
from tinyllm.errors import ArtifactError, DataError, GateError
from tinyllm.inference.generate import cache_dtype
from tinyllm.model.directory import load_config, save_model
from tinyllm.ops import cpu
from tinyllm.ops.decoder import Decoder
from tinyllm.ops.int4 import dequantize_groups, quantize_groups
from tinyllm.quantization.calibration import round_groups_to_inputs
from tinyllm.quantization.directory import save_quantized_model
from tinyllm.quantization.gate import QuantizeParams, check_gate
from tinyllm.quantization.int8 import quantize_model
from tinyllm.quantization.layers import Int8Embedding, QuantizedLinear
from tinyllm.quantization.load import load_any_model
from tinyllm.quantization.measure import measure_outputs
from tinyllm.quantization.transformer import NOT_HERE

IDS = torch.arange(40).view(2, 20)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    return tiny_model(tie_embeddings=request.param)


def save(model, directory, writer=save_quantized_model):
    with build_artifact(directory, kind="int8", made_from=[]) as draft:
        writer(model, draft.path)


def test_blocks_have_four_bits_and_embedding_and_head_eight(model):
    quantized = quantize_model(model, weight_bits=4)
    layers = {name.rpartition(".")[2]: each for name, each in quantized.named_modules()}
    assert type(layers["embed_tokens"]) is Int8Embedding
    assert layers["lm_head"].bits == 8
    assert {each.bits for name, each in layers.items() if name.endswith("_proj")} == {4}
    assert [name for name, each in layers.items() if getattr(each, "is_rotated", False)] == [
        "down_proj"
    ]
    exact, rounded = model.layers[0].mlp.up_proj, quantized.layers[0].mlp.up_proj
    found = dequantize_groups(rounded.weight_q, rounded.weight_scale)
    assert 0.02 < (found - exact.weight).norm() / exact.weight.norm() < 0.2
    assert cache_dtype(quantized) is torch.bfloat16


def test_noise_is_what_four_bits_promise(model):
    figures = measure_outputs(model, quantize_model(model, weight_bits=4), IDS)
    for kind, figure in figures.items():
        low, high = (30, 50) if kind in ("embed_tokens", "lm_head") else (16, 26)
        assert low < figure["sqnr_db"] < high, kind


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_whole_model_is_the_same_on_every_backend(model, backend, monkeypatch):
    with torch.inference_mode():
        expected = quantize_model(model, weight_bits=4)(IDS)
        monkeypatch.setenv("TINYLLM_KERNELS", backend)
        assert torch.equal(quantize_model(model, weight_bits=4)(IDS), expected)


def test_saved_and_loaded_gives_the_same_logits(model, tmp_path):
    quantized = quantize_model(model, weight_bits=4)
    save(quantized, tmp_path / "a")
    save(quantize_model(model, weight_bits=4), tmp_path / "b")
    save(quantize_model(model), tmp_path / "int8")
    assert load_config(tmp_path / "a")[1] == "int4-rotated"
    with torch.inference_mode():
        assert torch.equal(load_any_model(tmp_path / "a")(IDS), quantized(IDS))
    files = [(tmp_path / name / "model.safetensors") for name in ("a", "b", "int8")]
    assert files[0].read_bytes() == files[1].read_bytes()
    stored = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    saved = files[2].stat().st_size - files[0].stat().st_size
    assert saved > stored * (1 - 4.5 / 8) * 0.9  # row scales become group scales


def test_weights_of_another_format_are_refused_in_one_line(model, tmp_path):
    def mislabelled(model, directory):
        save_model(model, directory)
        config = directory / "config.json"
        config.write_text(config.read_text().replace('"float"', '"int4-rotated"'))

    save(model, tmp_path / "a", mislabelled)
    with pytest.raises(ArtifactError, match=r"do not fit config\.json") as caught:
        load_any_model(tmp_path / "a")
    assert len(str(caught.value).splitlines()) == 1


def test_an_odd_number_of_inputs_is_refused():
    with pytest.raises(DataError, match=r"down_proj has 63; set quantize\.weight_bits: 8"):
        quantize_model(tiny_model(d_ff=63), weight_bits=4)


def test_one_native_call_equals_layer_by_layer(model, monkeypatch):
    if cpu.load()[0] is None:
        pytest.skip("no native kernels here")
    model = quantize_model(model, weight_bits=4)
    ids = [5, 17, 33, 90, 2, 41, *range(40, 70)]
    native = cached_logits(model, ids)
    assert isinstance(model._prepared, Decoder)
    plain = copy.deepcopy(model)  # with nothing prepared
    monkeypatch.setenv("TINYLLM_KERNELS", "reference")
    layered = cached_logits(plain, ids)
    assert plain._prepared == NOT_HERE
    # The same up to fp32 rounding, but where an activation rounds to the next of 254 steps.
    assert (native - layered).norm() / layered.norm() < 5e-3


def test_a_model_of_two_formats_goes_layer_by_layer():
    model = quantize_model(tiny_model(), weight_bits=4)
    model.layers[0].mlp.up_proj = quantize_model(tiny_model()).layers[0].mlp.up_proj
    assert cached_logits(model, [*range(8)]).isfinite().all()
    assert model._prepared == NOT_HERE


def test_rounding_to_the_inputs_lowers_the_noise_of_outputs():
    """With the same scales: only the choice between neighbours differs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 70, generator=generator) @ torch.randn(70, 70, generator=generator)
    weight = torch.randn(33, 70, generator=generator)
    nearest, scale = quantize_groups(weight)
    chosen, same_scale = round_groups_to_inputs(weight, x.T @ x)
    assert torch.equal(scale, same_scale)
    noise = [(x @ (dequantize_groups(q, scale) - weight).T).norm() for q in (nearest, chosen)]
    assert noise[1] < 0.8 * noise[0]
    unrelated, _ = round_groups_to_inputs(weight, torch.eye(70))
    assert torch.equal(unrelated, nearest)


def test_the_gate_measures_each_kind_in_four_bits_and_tells_the_way_back(model):
    seen = []

    def evaluate(candidate):
        layers = [each for each in candidate.modules() if isinstance(each, QuantizedLinear)]
        seen.append({layer.bits for layer in layers})
        return 2.0

    knobs = {"max_bpb_increase_share": 0.005, "seq_len": 8, "calibration_tokens": 0}
    params = QuantizeParams(weight_bits=4, activation_bits=8, **knobs)
    with pytest.raises(GateError, match=r"set quantize\.weight_bits: 8$"):
        check_gate(model, 2.0, 2.3, params, evaluate)
    assert sum(4 in bits for bits in seen) == len(seen) - 2
