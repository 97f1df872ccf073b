import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_lm import tiny_model
from tiny_text import made_up_text, tiny_tokenizer

from stages.quantize import quantize
from tinyllm import paths
from tinyllm.artifact import build_artifact, file_sha256, load_manifest, verify_files
from tinyllm.errors import GateError, LineageError, ParamsError
from tinyllm.model.directory import load_config, save_model
from tinyllm.progress import Silent
from tinyllm.quantization.load import load_any_model
from tinyllm.shards.writer import EncodeParams, write_split

LIMIT = (
    "quantize:\n  weight_bits: 8\n  max_bpb_increase_share: {}\n  seq_len: 48\n"
    "  calibration_tokens: 480\n"
)


def make_tokenizer(seed: int) -> None:
    with build_artifact(paths.TOKENIZER, kind="tokenizer", made_from=[]) as draft:
        (draft.path / "tokenizer.json").write_text(str(seed))
        (draft.path / "chat_template.jinja").write_text(str(seed))


def make_tokens() -> None:
    digest = load_manifest(paths.TOKENIZER).digest
    with build_artifact(paths.TOKENS, kind="tokens", made_from=[paths.TOKENIZER]) as draft:
        splits = {
            split: write_split(
                [("play", made_up_text(150, seed=seed))],
                draft.path,
                split,
                tiny_tokenizer(320),
                digest,
                EncodeParams(shard_bytes=10**6),
                Silent(),
            )
            for seed, split in enumerate(("val", "train"))
        }
        draft.info.update(splits=splits, vocab_size=320, tokenizer=digest, dtype="uint16")


def make_model() -> None:
    copies = {name: paths.TOKENIZER / name for name in ("tokenizer.json", "chat_template.jinja")}
    model = tiny_model(vocab_size=320, tie_embeddings=True)
    with build_artifact(
        paths.LORA_MERGED, kind="lora", made_from=[paths.TOKENIZER], copies=copies
    ) as draft:
        save_model(model, draft.path)


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """A folder with everything before the stage."""
    monkeypatch.chdir(tmp_path)
    make_tokenizer(0)
    make_tokens()
    make_model()
    paths.PARAMS.write_text(LIMIT.format(0.05))


def test_the_artifact_and_the_report(pipeline):
    quantize()
    manifest = load_manifest(paths.INT8, "int8")
    verify_files(paths.INT8, manifest)
    assert set(manifest.lineage) == {"tokenizer", "tokens", "lora"}
    assert set(manifest.files) == {
        *("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
    }
    assert load_config(paths.INT8)[1] == "int8-rotated"
    metrics = json.loads(Path("reports/quantize/metrics.json").read_text())["quantize"]
    assert metrics["val_bpb_increase_share"] <= 0.05
    assert metrics["val_bpb"] == pytest.approx(metrics["val_bpb_before"], rel=0.05)
    assert metrics["int8_bytes"] == (paths.INT8 / "model.safetensors").stat().st_size
    assert metrics["int8_bytes"] < metrics["bf16_bytes"] < metrics["fp32_bytes"]
    assert 30 < metrics["layers"]["down_proj"]["sqnr_db"] < 50
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        exact, logits = (load_any_model(p)(ids) for p in (paths.LORA_MERGED, paths.INT8))
    assert (logits - exact).norm() / exact.norm() < 0.1


def test_four_bits_by_one_knob(pipeline):
    text = LIMIT.format(0.5).replace("weight_bits: 8", "weight_bits: 4")
    paths.PARAMS.write_text(text)
    quantize()
    manifest = load_manifest(paths.INT8, "int8")
    assert manifest.config["weight_bits"] == 4
    assert load_config(paths.INT8)[1] == "int4-rotated"
    metrics = json.loads(Path("reports/quantize/metrics.json").read_text())["quantize"]
    assert 16 < metrics["layers"]["down_proj"]["sqnr_db"] < 26
    assert 30 < metrics["layers"]["lm_head"]["sqnr_db"] < 50
    with torch.inference_mode():
        assert load_any_model(paths.INT8)(torch.arange(30)[None]).isfinite().all()
    shutil.rmtree(paths.INT8)
    paths.PARAMS.write_text(text.replace("0.5", "0.0").replace("bits: 4", "bits: 3"))
    with pytest.raises(ParamsError, match=r"quantize.*weight_bits: must be 8 or 4, got 3"):
        quantize()


def test_same_inputs_give_the_same_bytes(pipeline):
    quantize()
    first = {path.name: file_sha256(path) for path in paths.INT8.iterdir()}
    shutil.rmtree(paths.INT8)
    quantize()
    assert {path.name: file_sha256(path) for path in paths.INT8.iterdir()} == first


def test_a_broken_gate_leaves_nothing_behind(pipeline, monkeypatch):
    bpb = iter([2.0, 2.5, *[2.0] * 8, 2.4])  # before, after, then one kind at a time: lm_head costs
    report = type("Report", (), {"val_bpb": property(lambda self: next(bpb))})
    monkeypatch.setattr("stages.quantize.evaluate_stream", lambda *a, **k: report())
    with pytest.raises(GateError, match=r"25\.00%.*alone these cost: lm_head \+20\.00%"):
        quantize()
    assert not list(Path("data/models").glob("int8*"))
    assert not Path("reports/quantize").exists()


def test_tokens_of_another_tokenizer_are_refused(pipeline):
    make_tokenizer(1)
    make_model()
    with pytest.raises(LineageError, match="tokenizer"):
        quantize()
    assert not paths.INT8.exists()
