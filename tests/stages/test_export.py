import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "export"))
from export_case import write_adapted, write_clean

from stages.export import export
from tinyllm import paths
from tinyllm.artifact import build_artifact, load_manifest, verify_files
from tinyllm.errors import GateError, LineageError
from tinyllm.export import bundle
from tinyllm.model.directory import load_model
from tinyllm.quantization.directory import save_int8_model
from tinyllm.quantization.int8 import quantize_model

PARAMS = """export: {{opset: 20, onnx_fp16: true, onnx_int8: true, onnx_static: host,
  static_chunk: 8, gguf: [f32, q8_0], prompts: 2, prompt_tokens: 16, greedy_tokens: 24,
  max_logit_diff: {bar}}}
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder in which the stage has run once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("pipeline"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        paths.PARAMS.write_text(PARAMS.format(bar=1.0e-4))
        write_clean(paths.CLEAN)
        write_adapted(Path("made"), paths.CLEAN)
        for name, place in {
            **{"sft": paths.SFT, "adapter": paths.LORA_ADAPTER, "merged": paths.LORA_MERGED},
        }.items():
            shutil.move(Path("made") / name, place)
        with build_artifact(paths.INT8, kind="int8", made_from=[paths.LORA_MERGED]) as draft:
            save_int8_model(quantize_model(load_model(paths.LORA_MERGED)), draft.path)
        export()
        yield Path.cwd()


def test_artifact_is_whole_and_knows_its_ancestors(pipeline):
    manifest = load_manifest(paths.EXPORT, "export")
    verify_files(paths.EXPORT, manifest)
    assert set(manifest.lineage) == {"clean", "lora", "sft", "adapter", "int8"}
    names = set(manifest.files)
    assert {"hf/README.md", "hf/model.safetensors", "hf/chat_template.jinja"} < names
    assert {"peft/adapter_model.safetensors", "peft/base/config.json"} < names
    assert {"onnx/genai_config.json", "onnx/tokenizer_config.json"} < names
    assert {"onnx/model.onnx", "onnx/model_int8.onnx", "onnx/tokenizer.json"} < names
    assert {name for name in names if "gguf" in name} == {
        "gguf/model_f32.gguf",
        "gguf/model_q8_0.gguf",
    }
    assert "| val_bpb | 2.5 |" in (paths.EXPORT / "hf/README.md").read_text()


def test_metrics_have_the_parity_table(pipeline):
    rows = json.loads((paths.REPORTS / "export" / "metrics.json").read_text())["export"]
    for name in ("ours", "transformers", "peft", "onnx", "onnx_static"):
        assert rows[name]["greedy_equal_tokens"] == rows[name]["greedy_tokens"] > 48
        assert rows[name]["max_logit_diff"] < 1e-4
        assert "tokens_per_s" not in rows[name]
    assert rows["onnx_int8"]["max_logit_diff"] > 1e-4
    assert 0 < rows["ours_int8"]["kl"] < 0.01
    assert rows["text"]["unequal_texts"] == rows["text"]["unequal_chats"] == 0
    if "missing" not in rows["gguf_f32"]:
        assert rows["gguf_f32"]["file_bytes"] > 3 * rows["gguf_q8_0"]["file_bytes"] > 0
    assert rows["onnx"]["file_bytes"] == (paths.EXPORT / "onnx/model.onnx").stat().st_size


def test_difference_above_the_bar_fails_and_keeps_the_old_export(pipeline, monkeypatch):
    old, kept = load_manifest(paths.EXPORT).digest, pipeline / "kept.onnx"
    shutil.copy(paths.EXPORT / "onnx/model.onnx", kept)
    monkeypatch.setattr(bundle, "export_onnx", lambda model, path, opset: shutil.copy(kept, path))
    paths.PARAMS.write_text(PARAMS.format(bar=1.0e-12))
    with pytest.raises(GateError, match=r"transformers: logits differ(.|\n)*onnx: logits differ"):
        export()
    assert load_manifest(paths.EXPORT).digest == old
    assert not list(paths.EXPORT.parent.glob("*.tmp"))


def test_model_of_another_corpus_is_refused(pipeline):
    write_clean(paths.CLEAN, seed=7)
    with pytest.raises(LineageError, match="do not belong together: clean"):
        export()
