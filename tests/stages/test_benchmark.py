import json
from functools import partial

import pytest
from tiny_dirs import tokenizer_document, write_model_dir
from tiny_text import made_up_text

from stages import benchmark as stage
from stages.subjects import OnnxRunner, all_subjects
from tinyllm import paths
from tinyllm.artifact import build_artifact
from tinyllm.errors import LineageError, ParamsError
from tinyllm.evaluation.runners import TorchRunner
from tinyllm.evaluation.speed import Subject
from tinyllm.progress import Silent
from tinyllm.shards.writer import EncodeParams, write_split
from tinyllm.tokenizer.tokenizer import Tokenizer

PARAMS = """\
benchmark:
  prompt_tokens: {prompt_tokens}
  decode_tokens: 8
  decode_no_cache_tokens: 2
  warmup_rounds: 0
  rounds: 2
  eval_tokens: 100
  eval_seq_len: 16
"""


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """A folder with everything before the stage, all tiny and random, but no export."""
    monkeypatch.chdir(tmp_path)
    paths.PARAMS.write_text(PARAMS.format(prompt_tokens=8))
    write_model_dir(paths.PRETRAIN, "pretrain")
    write_model_dir(paths.SFT, "sft")
    write_model_dir(paths.LORA_MERGED, "lora")
    write_model_dir(paths.INT8, "int8")
    tokenizer = Tokenizer(tokenizer_document())
    with build_artifact(paths.TOKENS, kind="tokens", made_from=[]) as draft:
        documents = [("play", made_up_text(150))]
        size = EncodeParams(shard_bytes=10**6)
        split = write_split(documents, draft.path, "val", tokenizer, "a" * 64, size, Silent())
        draft.info.update(
            splits={"val": split},
            vocab_size=tokenizer.vocab_size,
            tokenizer="a" * 64,
            dtype="uint16",
        )
    return tmp_path


def write_empty_export() -> None:
    with build_artifact(paths.EXPORT, kind="export", made_from=[paths.LORA_MERGED]):
        pass


def reports() -> tuple[dict, dict]:
    folder = paths.REPORTS / "benchmark"
    return tuple(
        json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "hardware")
    )


def test_one_model_from_files_to_report(pipeline, monkeypatch):
    write_empty_export()
    subject = Subject(
        open=partial(TorchRunner.open, paths.LORA_MERGED, None, "cpu"),
        file=paths.LORA_MERGED / "model.safetensors",
    )
    monkeypatch.setattr(stage, "all_subjects", lambda *_: {"lora": subject})
    stage.benchmark()
    metrics, hardware = reports()
    row = metrics["benchmark"]["lora"]
    assert set(row) == {
        "prefill_tokens_per_s",
        "prefill_spread_share",
        "prefill_no_cache_tokens_per_s",
        "prefill_no_cache_spread_share",
        "decode_tokens_per_s",
        "decode_spread_share",
        "decode_no_cache_tokens_per_s",
        "decode_no_cache_spread_share",
        "first_token_ms",
        "peak_memory_bytes",
        "model_memory_bytes",
        "file_bytes",
        "val_bpb",
    }
    assert all(isinstance(value, int | float) for value in row.values())
    assert {"processor", "cores", "threads", "memory_bytes", "torch", "gpu"} <= set(hardware)


def test_a_prompt_beyond_the_context_is_told_before_any_work(pipeline):
    write_empty_export()
    paths.PARAMS.write_text(PARAMS.format(prompt_tokens=48))
    with pytest.raises(ParamsError, match=r"benchmark.prompt_tokens: 48 and 8 new tokens"):
        stage.benchmark()
    assert not paths.REPORTS.exists()


def test_models_of_another_lineage_are_refused(pipeline):
    write_model_dir(pipeline / "other", "lora", seed=9)
    with build_artifact(paths.EXPORT, kind="export", made_from=[pipeline / "other"]):
        pass
    with pytest.raises(LineageError, match="do not belong together: lora"):
        stage.benchmark()


@pytest.mark.slow
def test_every_model_with_its_onnx_file(pipeline):
    from tinyllm.export.onnx import export_onnx
    from tinyllm.export.onnx_int8 import quantize_onnx
    from tinyllm.model.directory import load_model

    with build_artifact(paths.EXPORT, kind="export", made_from=[paths.LORA_MERGED]) as draft:
        (draft.path / "onnx").mkdir()
        export_onnx(load_model(paths.LORA_MERGED), draft.path / "onnx/model.onnx", 20)
        quantize_onnx(draft.path / "onnx/model.onnx", draft.path / "onnx/model_int8.onnx")
    assert list(all_subjects("cpu", 1)) == [
        *("pretrain", "sft", "lora", "lora_bf16", "int8", "onnx", "onnx_int8"),
    ]
    theirs = OnnxRunner(paths.EXPORT / "onnx/model.onnx", 1)
    ours = TorchRunner.open(paths.LORA_MERGED, None, "cpu")
    answers = []
    for runner in (theirs, ours):
        tokens = [runner.prefill([5, 17, 42])]
        while len(tokens) < 12:
            tokens.append(runner.decode(tokens[-1]))
        assert runner.full([5, 17, 42, *tokens[:-1]]) == tokens[-1]
        answers.append(tokens)
    assert answers[0] == answers[1]
    stage.benchmark()
    metrics = reports()[0]["benchmark"]
    bpb = {name: row["val_bpb"] for name, row in metrics.items()}
    assert bpb["onnx"] == pytest.approx(bpb["lora"], rel=1e-5)
    assert bpb["pretrain"] == bpb["sft"] == bpb["lora"]  # the same random weights
    assert bpb["int8"] == pytest.approx(bpb["lora"], rel=0.05)
    assert metrics["int8"]["file_bytes"] < metrics["lora"]["file_bytes"] / 2
