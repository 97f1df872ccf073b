import copy
import io

import pytest
import torch
from tiny_lm import tiny_model

from tinyllm.artifact import build_artifact
from tinyllm.errors import ArtifactError, GateError
from tinyllm.model.directory import save_model
from tinyllm.ops.reference import bind_linear_w8a8, hadamard
from tinyllm.quantization.directory import save_quantized_model
from tinyllm.quantization.gate import QuantizeParams, check_gate, rank_kinds
from tinyllm.quantization.int8 import KINDS, kinds_of, quantize_model
from tinyllm.quantization.layers import Int8Embedding, QuantizedMatrix
from tinyllm.quantization.load import load_any_model
from tinyllm.quantization.measure import EXACT_DB, measure_outputs, model_bytes, sqnr_db

IDS = torch.arange(40).view(2, 20)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    return tiny_model(tie_embeddings=request.param)


def save(model, directory, writer):
    with build_artifact(directory, kind="int8", made_from=[]) as draft:
        writer(model, draft.path)


def test_every_matrix_becomes_int8_and_the_model_stays(model):
    before = copy.deepcopy(model.state_dict())
    quantized = quantize_model(model)
    layers = dict(quantized.named_modules())
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Embedding):
            assert isinstance(layers[name], QuantizedMatrix)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_int8_logits_are_near_and_a_layer_is_the_reference(model):
    quantized = quantize_model(model)
    with torch.inference_mode():
        exact, logits = model(IDS), quantized(IDS)
    assert 0 < (logits - exact).norm() / exact.norm() < 0.1  # four layers of 40 dB, with a margin
    layer = quantized.layers[0].mlp.down_proj
    x = torch.randn(3, 64)
    expected = bind_linear_w8a8(layer.weight_q, layer.weight_scale)(hadamard(x))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_whole_model_is_the_same_on_every_backend(model, backend, monkeypatch):
    with torch.inference_mode():
        expected = quantize_model(model)(IDS)
        monkeypatch.setenv("TINYLLM_KERNELS", backend)
        assert torch.equal(quantize_model(model)(IDS), expected)


def test_a_tied_matrix_is_stored_once():
    quantized = quantize_model(tiny_model(tie_embeddings=True))
    assert quantized.embed_tokens.weight_q is quantized.lm_head.weight_q


def test_embedding_looks_up_dequantised_rows():
    table = Int8Embedding(torch.tensor([[1, -2], [3, 127]], dtype=torch.int8), torch.tensor([2, 1]))
    assert table(torch.tensor([[1, 0]])).tolist() == [[[3, 127], [2, -4]]]


def test_saved_and_loaded_gives_the_same_logits(model, tmp_path):
    quantized = quantize_model(model)
    save(quantized, tmp_path / "int8", save_quantized_model)
    save(model, tmp_path / "float", save_model)
    with torch.inference_mode():
        assert torch.equal(load_any_model(tmp_path / "int8")(IDS), quantized(IDS))
        assert torch.equal(load_any_model(tmp_path / "float")(IDS), model(IDS))
    sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("int8", "float")]
    assert sizes[0] < sizes[1] * 0.6  # tiny matrices: scales, norms and names weigh a lot here


def test_saving_is_deterministic(model, tmp_path):
    for name in ("a", "b"):
        save(quantize_model(model), tmp_path / name, save_quantized_model)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b


def test_unknown_format_and_unfit_weights_are_refused(model, tmp_path):
    def as_int3(model, directory):
        save_model(model, directory)
        config = directory / "config.json"
        config.write_text(config.read_text().replace('"float"', '"int3"'))

    def float_weights(model, directory):
        save_model(model, directory)
        config = directory / "config.json"
        config.write_text(config.read_text().replace('"float"', '"int8-rotated"'))

    save(model, tmp_path / "a", as_int3)
    with pytest.raises(ArtifactError, match="'int3' weights.* float, int8-rotated, int4-rotated;"):
        load_any_model(tmp_path / "a")
    save(model, tmp_path / "b", float_weights)
    with pytest.raises(ArtifactError, match=r"do not fit config\.json"):
        load_any_model(tmp_path / "b")


def test_new_weights_are_used_after_loading_and_moving(model):
    quantized, other = quantize_model(model), quantize_model(tiny_model(seed=7))
    layer, source = quantized.layers[0].mlp.up_proj, other.layers[0].mlp.up_proj
    x = torch.randn(2, 32)
    layer(x)
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer(x), source(x))
    layer.to("cpu")
    assert torch.equal(layer(x), source(x))


def test_a_used_model_can_be_copied_and_pickled(model):
    quantized = quantize_model(model)
    with torch.inference_mode():
        expected = quantized(IDS)
        assert torch.equal(copy.deepcopy(quantized)(IDS), expected)
        file = io.BytesIO()
        torch.save(quantized, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(IDS), expected)


def test_sqnr_is_ten_times_the_logarithm():
    assert sqnr_db(100.0, 1.0) == pytest.approx(20.0)
    assert sqnr_db(1.0, 0.0) == EXACT_DB


def test_measured_noise_is_what_eight_bits_promise(model):
    figures = measure_outputs(model, quantize_model(model), IDS)
    assert list(figures) == kinds_of(model)
    assert set(KINDS) - set(figures) == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"}
    for kind, figure in figures.items():
        assert 30 < figure["sqnr_db"] < 50, kind


def test_measuring_a_model_against_itself_finds_no_noise(model):
    figures = measure_outputs(model, copy.deepcopy(model), IDS)
    assert {figure["sqnr_db"] for figure in figures.values()} == {EXACT_DB}


def test_bytes_count_a_tied_matrix_once():
    tied, untied = (model_bytes(tiny_model(tie_embeddings=t)) for t in (True, False))
    assert untied["fp32_bytes"] - tied["fp32_bytes"] == 4 * 97 * 32
    assert tied["fp32_bytes"] == 2 * tied["bf16_bytes"]


def quantized_kinds(model):
    return {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedMatrix)
    }


def test_the_gate_names_the_layers_that_cost(model):
    costs = {"down_proj": 0.2, "v_proj": 0.1}

    def evaluate(candidate):
        return 2.0 + sum(costs.get(kind, 0.0) for kind in quantized_kinds(candidate))

    params = QuantizeParams(
        weight_bits=8, max_bpb_increase_share=0.005, seq_len=8, calibration_tokens=0
    )
    check_gate(model, 2.0, 2.009, params, evaluate)
    with pytest.raises(GateError, match=r"15\.00%.*down_proj \+10\.00%, v_proj \+5\.00%"):
        check_gate(model, 2.0, 2.3, params, evaluate)
    with pytest.raises(GateError):
        check_gate(model, 2.0, float("nan"), params, evaluate)
    assert [kind for kind, _ in rank_kinds(model, 2.0, 8, evaluate)][:2] == ["down_proj", "v_proj"]


def test_params_refuse_values_out_of_range():
    message = r"^weight_bits: .*\nseq_len: .*\ncalib.*\nmax_bpb_incr"
    knobs = {"max_bpb_increase_share": -1.0, "seq_len": 0, "calibration_tokens": -1}
    with pytest.raises(ValueError, match=message) as caught:
        QuantizeParams(weight_bits=5, **knobs)
    assert len(str(caught.value).splitlines()) == 4
