import copy

import numpy as np
import onnx
import pytest
import torch
from export_case import lively_model, with_large_activations

from tinyllm.errors import ArtifactError, DataError
from tinyllm.export import onnx_static
from tinyllm.export.onnx_fp16 import to_fp16
from tinyllm.export.onnx_static import (
    DECODE,
    OPERATORS,
    PREFILL,
    export_static,
    static_problems,
)
from tinyllm.export.static_runtime import StaticModel, open_rounded
from tinyllm.inference.generate import generate
from tinyllm.inference.sampling import SamplingParams
from tinyllm.model.sizes import MlaSizes

TOLERANCE = 2e-5  # logits of about 10 through some 30 roundings of 6e-8
VOCAB, CHUNK = 97, 24
WAYS = ("host", "graph")
KINDS = {
    "latent, window, relu2": {
        **{"mla": MlaSizes(q_rank=16, kv_rank=24, d_nope=8, d_rope=4, d_v=12), "d_head": 12},
        **{"qk_norm": False, "n_kv_heads": 4, "window": 6, "window_layers": (0,)},
        **{"ffn": "relu2", "n_layers": 1},
    },
    "gpt-2": {
        **{"norm": "layernorm", "ffn": "gelu", "bias": True, "positions": "learned"},
        **{"n_kv_heads": 4, "qk_norm": False, "n_layers": 1},
    },
}
ROUNDINGS = 3
"""How many results of ours are rounded to fp16 for one of torch's, whose norms, rotations and
softmax stay in fp32 inside; errors add up likewise."""


def export(model, folder, writes="host", chunk=CHUNK):
    folder.mkdir()
    export_static(model, folder, opset=20, chunk=chunk, writes=writes)
    return folder


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    model = lively_model(VOCAB, tie_embeddings=True, max_seq_len=220)
    folder = tmp_path_factory.mktemp("static")
    return model, {way: export(model, folder / way, way) for way in WAYS}


def ids_of(n_tokens, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, n_tokens).tolist()


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]))[0].float().numpy()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [PREFILL, DECODE])
def test_no_dimension_is_free_and_no_operator_is_rare(case, way, name):
    proto = onnx.load(case[1][way] / name)
    assert static_problems(proto) == []
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
    values = {v.name: v for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    assert {out for node in proto.graph.node for out in node.output} <= set(values)
    for value in values.values():
        assert all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim), value.name
    assert {node.op_type for node in proto.graph.node} <= OPERATORS
    assert {node.domain for node in proto.graph.node} == {""}
    for tensor in proto.graph.initializer:  # a mask must be of finite numbers
        assert np.isfinite(onnx.numpy_helper.to_array(tensor)).all()


def test_what_is_not_static_is_named(case):
    proto = onnx.load(case[1]["host"] / DECODE)
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "seq"
    next(node for node in proto.graph.node if node.op_type == "Sigmoid").op_type = "Erf"
    problems = static_problems(proto)
    assert problems[0] == "operator Erf is none of those that such chips have"
    assert "input_ids has no fixed shape" in problems


@pytest.mark.parametrize("way", WAYS)
def test_200_greedy_tokens_equal_ours_to_the_end_of_the_context(case, way):
    model, folders = case
    prompt = ids_of(20)
    expected = list(generate(model, prompt, SamplingParams(max_new_tokens=200), ()))
    answer, steps = StaticModel(folders[way], n_threads=1).greedy(prompt, 200)
    assert answer == expected
    assert len(set(expected)) > 4  # a text that wanders
    ours = logits_of(model, [*prompt, *expected[:-1]])[19:]
    np.testing.assert_allclose(steps, ours, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("n_tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 220])
def test_a_prompt_of_any_length_equals_one_pass_of_ours(case, n_tokens):
    model, folders = case
    ids = ids_of(n_tokens)
    both = [StaticModel(folders[way], n_threads=1).logits(ids) for way in WAYS]
    for theirs in both:
        np.testing.assert_allclose(theirs, logits_of(model, ids), atol=TOLERANCE, rtol=0)


def test_both_ways_leave_the_same_cache(case):
    caches = []
    for folder in case[1].values():
        static, ids = StaticModel(folder, n_threads=1), ids_of(CHUNK + 6)
        _, cache = static.forward(ids[:-1], 0, static.empty_cache())
        _, cache = static.forward(ids[-1:], len(ids) - 1, cache)
        caches.append([part[:, :, : len(ids)] for part in cache])
    for host, graph in zip(*caches, strict=True):
        assert np.abs(host).min(axis=-1).all()  # every slot was written
        np.testing.assert_allclose(host, graph, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_slots_behind_the_position_are_not_looked_at(case, way):
    static, ids = StaticModel(case[1][way], n_threads=1), ids_of(40)
    results = []
    for garbage in (0.0, 1000.0):
        cache = static.empty_cache()
        for part in cache:
            part += garbage
        first, cache = static.forward(ids[:30], 0, cache)
        results.append((first, static.forward(ids[30:], 30, cache)[0]))
    for clean, dirty in zip(*results, strict=True):
        np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize(
    ("kind", "way"), [*((kind, "host") for kind in KINDS), ("latent, window, relu2", "graph")]
)
def test_every_kind_of_block_is_exported(kind, way, tmp_path):
    model = lively_model(VOCAB, tie_embeddings=True, **KINDS[kind])
    static = StaticModel(export(model, tmp_path / way, way), n_threads=1)
    assert static.writes_on_host == (way == "host")
    ids = ids_of(64)
    logits, cache = static.forward(ids[:30], 0, static.empty_cache())
    steps = [logits]
    for position in range(30, 64):
        logits, cache = static.forward(ids[position : position + 1], position, cache)
        steps.append(logits)
    ours = logits_of(model, ids)
    np.testing.assert_allclose(np.concatenate(steps), ours, atol=TOLERANCE, rtol=0)


def fp16_error(model, ids):
    """Largest logit error of torch's own fp16."""
    return np.abs(logits_of(copy.deepcopy(model).half(), ids) - logits_of(model, ids)).max()


@pytest.mark.parametrize("way", WAYS)
def test_with_every_result_in_fp16_it_is_as_near_as_fp16_can_be(case, way, tmp_path):
    model, folders = case
    ids = ids_of(100)
    allowed, ours = ROUNDINGS * fp16_error(model, ids), logits_of(model, ids)
    rounded = open_rounded(folders[way], n_threads=1).logits(ids)
    assert 0 < np.abs(rounded - ours).max() <= allowed
    for name in (PREFILL, DECODE):
        to_fp16(folders[way] / name, tmp_path / name)
        assert (tmp_path / name).stat().st_size < 0.7 * (folders[way] / name).stat().st_size
    half = StaticModel(tmp_path, n_threads=1)
    assert half.empty_cache()[0].dtype == np.float16
    assert 0 < np.abs(half.logits(ids) - ours).max() <= allowed


def test_activations_of_5000_survive_fp16_but_not_with_a_plain_norm(tmp_path, monkeypatch):
    model, ids = lively_model(VOCAB, tie_embeddings=False, n_layers=1), ids_of(60)
    large = with_large_activations(model, 5000)
    ours = logits_of(large, ids)
    safe = open_rounded(export(large, tmp_path / "safe"), n_threads=1).logits(ids)
    assert np.abs(safe - ours).max() <= ROUNDINGS * fp16_error(large, ids)
    monkeypatch.setattr(onnx_static, "make_fp16_safe", lambda model: model)
    naive = export(large, tmp_path / "naive")
    assert not open_rounded(naive, n_threads=1).logits(ids).any()  # 5000^2 is inf, 1 / inf is 0
    in_fp32 = StaticModel(naive, n_threads=1).logits(ids)
    np.testing.assert_allclose(in_fp32, ours, atol=TOLERANCE, rtol=0)  # only fp16 is at fault


def test_what_cannot_be_is_told_in_one_line(case, tmp_path):
    with pytest.raises(DataError, match=r"chunk of 65 .* context of 64; .* export\.static_chunk"):
        export(lively_model(VOCAB, n_layers=1), tmp_path / "long", chunk=65)
    static = StaticModel(case[1]["host"], n_threads=1)
    with pytest.raises(DataError, match="221 tokens do not fit into a cache of 220"):
        static.logits(ids_of(221))


@pytest.mark.parametrize("left", [0, 10, 0.5, -1])
def test_a_damaged_file_is_told_in_one_line(case, tmp_path, left):
    for name in (PREFILL, DECODE):
        whole = (case[1]["host"] / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: int(left * len(whole)) if left == 0.5 else left])
    with pytest.raises(ArtifactError, match=r"^[^\n]*prefill\.onnx: ONNX Runtime cannot[^\n]*$"):
        StaticModel(tmp_path, n_threads=1)
    with pytest.raises(ArtifactError, match=r"^[^\n]*prefill\.onnx: not a whole[^\n]*$"):
        to_fp16(tmp_path / PREFILL, tmp_path / "half.onnx")
