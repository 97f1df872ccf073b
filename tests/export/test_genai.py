"""The ONNX folder in ONNX Runtime GenAI itself; skipped where it is not installed."""

import shutil

import numpy as np
import pytest
import torch
from export_case import lively_model, write_clean, write_model
from test_families import LATENT

from tinyllm.errors import ArtifactError
from tinyllm.export import formats
from tinyllm.export.bundle import write_bundle
from tinyllm.export.genai import GenaiModel, genai_refuses
from tinyllm.export.our_runtime import OurModel
from tinyllm.export.params import ExportParams
from tinyllm.export.proof import prove_bundle
from tinyllm.model.directory import load_model
from tinyllm.progress import Silent
from tinyllm.tokenizer.tokenizer import Tokenizer

PARAMS = ExportParams(
    opset=20,
    onnx_int8=False,
    onnx_fp16=False,
    onnx_static=None,
    static_chunk=8,
    gguf=(),
    prompts=1,
    prompt_tokens=8,
    greedy_tokens=6,
    max_logit_diff=1e-4,
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("genai")
    write_clean(folder / "clean")
    write_model(folder / "model", folder / "clean")
    (folder / "export").mkdir()
    write_bundle(folder / "model", folder / "export", PARAMS, Silent())
    return folder / "model", folder / "export"


def test_folder_runs_as_it_is_with_our_answers(exported):
    pytest.importorskip("onnxruntime_genai")
    source, export = exported
    theirs, ours = GenaiModel(export / "onnx"), load_model(source)
    ids = list(range(6, 30))
    with torch.no_grad():
        reference = ours(torch.tensor([ids]))[0].numpy()
    np.testing.assert_allclose(theirs.logits(ids), reference, atol=2e-5, rtol=0)
    expected, steps = OurModel(ours).greedy(ids, 30)
    answer, theirs_steps = theirs.greedy(ids, 30)
    assert answer == expected
    np.testing.assert_allclose(theirs_steps, steps, atol=2e-5, rtol=0)
    text = "It's 12345 — naïve 😀 words"
    assert theirs.encode(text) == Tokenizer.load(source).encode(text)


def test_truncated_graph_is_one_line(exported, tmp_path):
    pytest.importorskip("onnxruntime_genai")
    shutil.copytree(exported[1] / "onnx", tmp_path / "onnx")
    graph = tmp_path / "onnx" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:20_000])
    with pytest.raises(ArtifactError, match="GenAI cannot load it") as refusal:
        GenaiModel(tmp_path / "onnx")
    assert "\n" not in str(refusal.value)


def test_missing_runtime_is_listed_and_never_passes(exported, monkeypatch):
    find = formats.find_spec
    monkeypatch.setattr(formats, "find_spec", lambda n: None if "genai" in n else find(n))
    source, export = exported
    proof = prove_bundle(source, export, ["some held-out words"], PARAMS, Silent())
    assert proof.missing == {"onnx_genai": "not installed: onnxruntime_genai"}
    assert "onnx_genai" not in proof.rows
    assert {"ours", "transformers", "onnx"} <= set(proof.exact)
    assert proof.to_metrics()["onnx_genai"] == {"missing": "not installed: onnxruntime_genai"}


def test_latent_attention_is_refused_with_what_works():
    assert "model.attention: gqa works" in genai_refuses(lively_model(97, **LATENT).config)
    assert genai_refuses(lively_model(97).config) is None
