import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from export_case import lively_model, with_large_activations

from tinyllm.errors import ArtifactError
from tinyllm.export.onnx import export_onnx, past_names
from tinyllm.export.onnx_fp16 import make_norms_safe, round_everything, to_fp16
from tinyllm.export.onnx_int8 import quantize_onnx
from tinyllm.export.onnx_qdq import quantize_qdq
from tinyllm.export.runtime import OnnxModel
from tinyllm.inference.generate import generate
from tinyllm.inference.sampling import SamplingParams
from tinyllm.model.sizes import MlaSizes

TOLERANCE = 2e-5  # logits of about 10 through some 30 roundings of 6e-8
VOCAB = 97
KINDS = {
    "latent, window, relu2": {
        **{"mla": MlaSizes(q_rank=16, kv_rank=24, d_nope=8, d_rope=4, d_v=12), "d_head": 12},
        **{"qk_norm": False, "n_kv_heads": 4, "window": 6, "window_layers": (0,)},
        "ffn": "relu2",
    },
    "gpt-2": {
        **{"norm": "layernorm", "ffn": "gelu", "bias": True, "positions": "learned"},
        **{"n_kv_heads": 4, "qk_norm": False},
    },
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    model = lively_model(VOCAB, tie_embeddings=True)
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    before = logging.root.handlers[:], logging.root.level, logging.root.manager.disable
    export_onnx(model, file, opset=20)
    quantize_onnx(file, file.with_name("int8.onnx"))
    quantize_qdq(file, file.with_name("qdq.onnx"))
    to_fp16(file, file.with_name("fp16.onnx"))
    assert before == (logging.root.handlers[:], logging.root.level, logging.root.manager.disable)
    return model, file


def ids_of(n_rows, n_tokens, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (n_rows, n_tokens))


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids)).numpy()


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (3, 17)])
def test_one_pass_equals_ours_for_any_batch_and_length(case, shape):
    model, file = case
    onnx, ids = OnnxModel(file, n_threads=1), ids_of(*shape)
    logits, past = onnx.forward(ids, onnx.empty_past(shape[0]))
    np.testing.assert_allclose(logits, logits_of(model, ids), atol=TOLERANCE, rtol=0)
    assert past[0].shape() == [shape[0], 2, shape[1], 8]


@pytest.mark.parametrize("cuts", [[5], [1, 2, 3], [20, 21, 22]])
def test_passes_over_pieces_with_the_cache_equal_one_pass(case, cuts):
    model, file = case
    onnx, ids = OnnxModel(file, n_threads=1), ids_of(2, 24)
    past, pieces = onnx.empty_past(2), []
    for piece in np.split(ids, cuts, axis=1):
        logits, past = onnx.forward(piece, past)
        pieces.append(logits)
    joined = np.concatenate(pieces, axis=1)
    np.testing.assert_allclose(joined, logits_of(model, ids), atol=TOLERANCE, rtol=0)


def test_a_row_padded_on_the_left_equals_the_row_alone(case):
    model, file = case
    onnx, ids = OnnxModel(file, n_threads=1), ids_of(2, 12)
    mask = np.ones((2, 12), np.int64)
    mask[1, :5] = 0
    logits, past = onnx.forward(ids, onnx.empty_past(2), mask)
    new = ids_of(2, 1, seed=9)
    step, _ = onnx.forward(new, past, np.concatenate((mask, np.ones((2, 1), np.int64)), axis=1))
    alone = logits_of(model, np.concatenate((ids[1:, 5:], new[1:]), axis=1))
    np.testing.assert_allclose(logits[1:, 5:], alone[:, :-1], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(step[1:], alone[:, -1:], atol=TOLERANCE, rtol=0)


def test_greedy_text_equals_ours_to_the_end_of_the_context(case):
    model, file = case
    prompt = ids_of(1, 7)[0].tolist()
    expected = list(generate(model, prompt, SamplingParams(max_new_tokens=57), ()))
    answer, steps = OnnxModel(file, n_threads=1).greedy(prompt, 57)
    assert answer == expected
    assert len(set(expected)) > 4  # a text that wanders
    full = logits_of(model, np.array([[*prompt, *expected[:-1]]]))[0, 6:]
    np.testing.assert_allclose(steps, full, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_block_is_exported(kind, tmp_path):
    model = lively_model(VOCAB, tie_embeddings=True, n_layers=1, **KINDS[kind])
    export_onnx(model, tmp_path / "model.onnx", opset=20)
    quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    float_, int8 = (OnnxModel(tmp_path / f"{n}.onnx", n_threads=1) for n in ("model", "int8"))
    ids = ids_of(2, 24)
    past, pieces = float_.empty_past(2), []
    for piece in np.split(ids, [1, 9, 10], axis=1):
        logits, past = float_.forward(piece, past)
        pieces.append(logits)
    ours = logits_of(model, ids)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), ours, atol=TOLERANCE, rtol=0)
    noise = int8.forward(ids, int8.empty_past(2))[0] - ours
    assert np.linalg.norm(noise) < 0.05 * np.linalg.norm(ours)
    mask = np.ones((2, 24), np.int64)
    mask[1, :9] = 0  # padding on the left
    padded, _ = float_.forward(ids, float_.empty_past(2), mask)
    alone = logits_of(model, ids[1:, 9:])
    np.testing.assert_allclose(padded[1:, 9:], alone, atol=TOLERANCE, rtol=0)


def test_same_model_gives_the_same_bytes(case, tmp_path):
    model, file = case
    export_onnx(model, tmp_path / "again.onnx", opset=20)
    assert (tmp_path / "again.onnx").read_bytes() == file.read_bytes()


def test_file_names_no_machine_and_no_source_line(case):
    for content in (path.read_bytes() for path in case[1].parent.glob("*.onnx")):
        for word in (str(Path.cwd()), str(Path.home()), "site-packages", ".py", "/tmp"):
            assert word.encode() not in content


def test_int8_is_smaller_and_close(case):
    model, file = case
    int8 = OnnxModel(file.with_name("int8.onnx"), n_threads=1)
    ids = ids_of(1, 40)
    ours, theirs = logits_of(model, ids)[0], int8.logits(ids[0].tolist())
    noise = np.linalg.norm(theirs - ours) / np.linalg.norm(ours)
    # 7 bits and a sign for weights and activations: 1/254 of the block's largest each, 14 matrices
    assert 1e-4 < noise < 0.05
    operators = _operators(file.with_name("int8.onnx"))
    assert operators.count("MatMulNBits") == 2 * 7 + 1  # every matrix, and the tied head


def test_qdq_equals_our_model_with_weights_rounded_in_blocks(case):
    model, file = copy.deepcopy(case[0]), case[1].with_name("qdq.onnx")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                blocks = layer.weight.view(layer.out_features, -1, 32)
                scale = blocks.abs().amax(-1, keepdim=True) / 127
                blocks.copy_((blocks / scale).round() * scale)
    from onnx.reference import ReferenceEvaluator

    ids = ids_of(1, 20)
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(20)[None],
    }
    feeds |= {name: np.zeros((1, 2, 0, 8), np.float32) for name in past_names(2)}
    by_the_standard = ReferenceEvaluator(str(file)).run(["logits"], feeds)[0]
    np.testing.assert_allclose(by_the_standard, logits_of(model, ids), atol=TOLERANCE, rtol=0)
    # ONNX Runtime multiplies in integers here as well: 7 bits and a sign for activations too
    noise = OnnxModel(file, n_threads=1).logits(ids[0].tolist()) - by_the_standard[0]
    assert np.linalg.norm(noise) < 0.05 * np.linalg.norm(by_the_standard)
    assert _operators(file).count("DequantizeLinear") == 2 * 7 + 1
    assert file.stat().st_size < 0.7 * case[1].stat().st_size


def fp16_allowed(model, ids):
    """Three times the error of torch's fp16, whose norms, rotations and softmax are fp32 inside."""
    theirs = logits_of(copy.deepcopy(model).half(), ids).astype(np.float32)
    return 3 * np.abs(theirs - logits_of(model, ids)).max()


def test_fp16_file_has_no_fp32_but_its_logits_and_is_as_near_as_fp16_can_be(case):
    import onnx

    model, file = case[0], case[1].with_name("fp16.onnx")
    proto = onnx.shape_inference.infer_shapes(onnx.load(file), strict_mode=True).graph
    values = (*proto.value_info, *proto.input, *proto.output)
    fp32 = onnx.TensorProto.FLOAT
    assert {v.name for v in values if v.type.tensor_type.elem_type == fp32} == {"logits"}
    assert not [t.name for t in proto.initializer if t.data_type == fp32]
    ids = ids_of(2, 40)
    ours, half = logits_of(model, ids), OnnxModel(file, n_threads=1)
    first, past = half.forward(ids[:, :30], half.empty_past(2))
    theirs = np.concatenate((first, half.forward(ids[:, 30:], past)[0]), axis=1)
    assert 0 < np.abs(theirs - ours).max() <= fp16_allowed(model, ids)


def test_fp16_norms_hold_activations_of_5000(case, tmp_path):
    import onnx

    export_onnx(with_large_activations(case[0], 5000), tmp_path / "naive.onnx", opset=20)
    proto = onnx.load(tmp_path / "naive.onnx")
    make_norms_safe(proto.graph)
    onnx.save(proto, tmp_path / "safe.onnx")
    ids, results = ids_of(1, 40), {}
    for name in ("naive", "safe"):
        round_everything(tmp_path / f"{name}.onnx", tmp_path / f"{name}_16.onnx")
        rounded = OnnxModel(tmp_path / f"{name}_16.onnx", n_threads=1)
        results[name] = rounded.forward(ids, rounded.empty_past(1))[0]
    assert not results["naive"].any()  # 5000^2 is inf in fp16, 1 / inf is 0
    assert np.abs(results["safe"] - logits_of(case[0], ids)).max() <= fp16_allowed(case[0], ids)


def test_what_cannot_be_loaded_is_told_in_one_line(tmp_path):
    with pytest.raises(ArtifactError, match="no such file; build it"):
        OnnxModel(tmp_path / "model.onnx", n_threads=1)
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ArtifactError, match=r"^[^\n]*model\.onnx: ONNX Runtime cannot[^\n]*$"):
        OnnxModel(tmp_path / "model.onnx", n_threads=1)


def _operators(path):
    import onnx

    return [node.op_type for node in onnx.load(path).graph.node]
