"""`quantize.weight_bits: 4` from the stage to the report, and on the command line."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

sys.path.append(str(Path(__file__).parent.parent / "export"))
from export_case import write_adapted, write_clean
from tiny_dirs import write_tokens
from tiny_text import made_up_text

from stages.benchmark import benchmark
from stages.export import export
from stages.quantize import quantize
from stages.report import report
from stages.subjects import all_subjects
from tinyllm import paths
from tinyllm.artifact import build_artifact, load_manifest
from tinyllm.cli import main
from tinyllm.errors import LineageError
from tinyllm.export.our_runtime import OurModel
from tinyllm.inference.session import open_session
from tinyllm.model.directory import COPIED, WEIGHTS
from tinyllm.quantization.load import load_any_model

QUANTIZE = {"max_bpb_increase_share": 0.5, "seq_len": 48, "calibration_tokens": 480}
EXPORT = {
    **{"opset": 20, "onnx_fp16": False, "onnx_int8": False, "onnx_static": None, "static_chunk": 8},
    **{"gguf": [], "prompts": 1, "prompt_tokens": 8, "greedy_tokens": 4, "max_logit_diff": 1e-4},
}
BENCHMARK = {
    **{"prompt_tokens": 8, "decode_tokens": 4, "decode_no_cache_tokens": 1, "warmup_rounds": 0},
    **{"rounds": 1, "eval_tokens": 100, "eval_seq_len": 16},
}


def write_params(weight_bits):
    quantize = {"weight_bits": weight_bits, **QUANTIZE}
    with paths.PARAMS.open("w") as file:
        sections = {"quantize": quantize, "export": EXPORT, "benchmark": BENCHMARK}
        YAML(typ="safe").dump(sections, file)


def quantized_subject(*machine):
    """One of the models that the benchmark measures: each takes a process of its own."""
    file = paths.INT8 / WEIGHTS
    return {name: each for name, each in all_subjects(*machine).items() if each.file == file}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder in which the stages from quantize on have run with 4 bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("pipeline"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TINYLLM_DEVICE", "cpu")
        write_clean(paths.CLEAN)
        write_adapted(Path("made"), paths.CLEAN)
        for name, place in {
            **{"sft": paths.SFT, "adapter": paths.LORA_ADAPTER, "merged": paths.LORA_MERGED},
        }.items():
            shutil.move(Path("made") / name, place)
        shutil.copytree(paths.SFT, paths.PRETRAIN)
        copies = {name: paths.SFT / name for name in COPIED}
        with build_artifact(paths.TOKENIZER, kind="tokenizer", made_from=[], copies=copies):
            pass
        write_tokens()
        write_params(4)
        patch.setattr("stages.benchmark.all_subjects", quantized_subject)
        for stage in (quantize, export, benchmark, report):
            stage()
        yield


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process; return what it printed, of a refusal the reason."""

    def run_command(*arguments, stdin="", code=0):
        monkeypatch.setattr("sys.argv", ["tinyllm", *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert ended.value.code == code, err
        return err if code else out

    return run_command


def metrics(stage):
    return json.loads((paths.REPORTS / stage / "metrics.json").read_text())[stage]


def test_every_number_is_called_by_its_bits(pipeline):
    size = (paths.INT8 / WEIGHTS).stat().st_size
    assert metrics("quantize")["int4_bytes"] == metrics("benchmark")["int4"]["file_bytes"] == size
    ours = OurModel(load_any_model(paths.INT8))
    assert metrics("export")["ours_int4"]["file_bytes"] == ours.n_bytes
    assert 0.01 < metrics("export")["ours_int4"]["kl"] < 1
    page = paths.REPORT_PAGE.read_text()
    assert "tokens per second in INT4" in page
    for text in (page, *(str(metrics(stage)) for stage in ("quantize", "export", "benchmark"))):
        assert not {"ours_int8", "int8_bytes", "INT8"} & set(text.replace("<", " ").split())


def test_the_artifact_has_its_place_in_the_lineage(pipeline, tmp_path, monkeypatch):
    """Another quantised model in the place of the one an export names is refused, bits or not."""
    assert load_manifest(paths.EXPORT).lineage["int8"] == load_manifest(paths.INT8).digest
    shutil.copytree("data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    write_params(8)
    quantize()
    with pytest.raises(LineageError, match="do not belong together: int8"):
        benchmark()


def test_the_command_line_takes_the_folder(pipeline, run):
    assert "ours_int4" in run("verify", paths.LORA_MERGED, "--export-dir", paths.EXPORT)
    text = ("the", "--temperature", 0, "--max-tokens", 12)
    plain = run("generate", paths.INT8, *text)
    for draft in ("lookup", "layers"):
        assert run("generate", paths.INT8, *text, "--draft", draft) == plain
    refusal = run("generate", paths.INT8, *text, "--draft", "int8", code=2)
    assert "quantised already; take lookup or layers" in refusal
    session = open_session(paths.INT8, load_any_model, torch.device("cpu"))
    assert session.description == f"{paths.INT8}: int4, context 64"
    assert run("chat", paths.INT8, *text[1:], stdin=f"{made_up_text(4)}\n").strip()
