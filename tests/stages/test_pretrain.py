import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_dirs import write_tokens
from tiny_text import tiny_tokenizer

from stages.identity import identity, trajectory
from stages.pretrain import Params, pretrain
from tinyllm import paths
from tinyllm.artifact import build_artifact, file_sha256, load_manifest, verify_files, write_json
from tinyllm.errors import DataError, LineageError, ParamsError
from tinyllm.evaluation.probe import PROBE_TOKENS, Probe
from tinyllm.model.directory import load_model
from tinyllm.params import load_params, read_yaml
from tinyllm.shards.reader import TokenShards
from tinyllm.tokenizer.chat import CHAT_TEMPLATE
from tinyllm.tokenizer.tokenizer import Tokenizer
from tinyllm.training.step import Stepper

ROOT = Path(__file__).parent.parent.parent
TINY = {
    "model": {"d": 32, "n_layers": 1, "n_heads": 2, "d_ff": 64, "max_seq_len": 24},
    "pretrain": {
        "steps": 12,
        "seq_len": 16,
        "batch_size": 4,
        "warmup_steps": 2,
        "log_every": 3,
        "eval_every": 6,
        "sample_every": 0,
        "save_every": 5,
    },
}


def write_params(**changes) -> None:
    params = read_yaml(ROOT / paths.PARAMS)
    for section, values in TINY.items():
        params[section] |= values | changes.get(section, {})
    write_json(paths.PARAMS, params)  # JSON is YAML


def make_tokenizer(seed: int = 0) -> None:
    tokenizer = tiny_tokenizer(320, seed)
    with build_artifact(paths.TOKENIZER, kind="tokenizer", made_from=[]) as draft:
        (draft.path / "tokenizer.json").write_text(tokenizer.backend.to_str(), encoding="utf-8")
        (draft.path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """A folder with everything before the stage."""
    monkeypatch.chdir(tmp_path)
    for name in ("TINYLLM_INFLIGHT", "TINYLLM_FRESH", "DVC_STAGE", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    make_tokenizer()
    write_tokens()
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    for code in ("stages", "tinyllm"):
        Path(code).symlink_to(ROOT / code)
    write_params()
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """Which batches a run asks for."""
    indices = []
    real = Stepper.run

    def run(self, step, *rest):
        indices.append(step)
        return real(self, step, *rest)

    monkeypatch.setattr(Stepper, "run", run)
    return indices


def outputs() -> dict[str, str]:
    files = [*sorted(paths.PRETRAIN.iterdir()), paths.REPORTS / "pretrain" / "curve.tsv"]
    return {path.name: file_sha256(path) for path in files}


def test_the_stage_leaves_a_model_its_curve_and_its_metrics(pipeline, asked):
    pretrain()
    assert asked == list(range(12))
    manifest = load_manifest(paths.PRETRAIN, "pretrain")
    verify_files(paths.PRETRAIN, manifest)
    assert set(manifest.lineage) == {"tokenizer", "tokens"}
    assert "log_every" not in manifest.config["pretrain"]
    model = load_model(paths.PRETRAIN)
    assert model.config.vocab_size == Tokenizer.load(paths.PRETRAIN).vocab_size == 320
    assert (paths.PRETRAIN / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    metrics = json.loads((paths.REPORTS / "pretrain/metrics.json").read_text())["pretrain"]
    assert metrics["val_bpb"] > 0
    assert metrics["n_tokens"] == TokenShards.open(paths.TOKENS, "val", None).n_tokens - 1
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert all(isinstance(value, int | float) for value in metrics.values())
    header, *rows = (paths.REPORTS / "pretrain/curve.tsv").read_text().splitlines()
    assert header.split("\t")[:2] == ["step", "train_loss"]
    assert [row.split("\t")[0] for row in rows] == ["0", "3", "6", "9", "12"]
    samples = json.loads((paths.REPORTS / "pretrain/samples.json").read_text())
    assert [sample["step"] for sample in samples] == [0, 12]


def test_a_failure_after_training_costs_no_step_and_no_bit(pipeline, asked, monkeypatch):
    pretrain()
    expected = outputs()
    shutil.rmtree(paths.PRETRAIN)
    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr("stages.pretrain.save_model", lambda *_: (_ for _ in ()).throw(OSError(28)))
        with pytest.raises(OSError, match="28"):
            pretrain()
    assert not paths.PRETRAIN.exists()
    write_params(pretrain={"log_every": 3, "save_every": 4})  # tells and stores, shapes nothing
    pretrain()
    assert asked == []
    assert outputs() == expected
    monkeypatch.setenv("TINYLLM_FRESH", "1")
    pretrain()
    assert asked == list(range(12))
    assert outputs() == expected


def test_bad_input_is_refused_before_a_step(pipeline, asked):
    write_params(pretrain={"seq_len": 25})
    with pytest.raises(ParamsError, match=r"pretrain.seq_len: 25 .* model.max_seq_len = 24"):
        pretrain()
    write_params(pretrain={"lr": 0.0})
    with pytest.raises(ParamsError, match=r"pretrain.lr: must be above 0"):
        pretrain()
    write_params()
    make_tokenizer(seed=9)
    with pytest.raises(LineageError):
        pretrain()
    assert asked == []
    assert not paths.PRETRAIN.exists()


def test_documents_without_their_end_are_refused_unless_nobody_asks(pipeline, asked, monkeypatch):
    real = TokenShards.documents
    monkeypatch.setattr(TokenShards, "documents", lambda self: (d[:-1] for d in real(self)))
    with pytest.raises(DataError, match=r"train: document 0 does not end with <|endoftext|>"):
        pretrain()
    assert asked == []
    write_params(pretrain={"preflight": False})
    pretrain()


def test_the_identity_knows_params_inputs_and_code_and_nothing_else(pipeline):
    inputs = [paths.TOKENS, paths.TOKENIZER]
    params = load_params(Params, paths.PARAMS)
    run = identity("pretrain", params, inputs)
    quiet = replace(params, pretrain=replace(params.pretrain, log_every=1, save_every=9))
    assert identity("pretrain", quiet, inputs) == run
    faster = replace(params, pretrain=replace(params.pretrain, lr=1.0))
    assert identity("pretrain", faster, inputs)["params"] != run["params"]
    assert trajectory(params)["pretrain"]["lr"] == params.pretrain.lr
    assert "tinyllm/training" in run["code"]
    assert "stages/pretrain.py" in run["code"]
    assert "data/tokens" not in run["code"]
    write_tokens(n_words=700)
    assert identity("pretrain", params, inputs)["inputs"] != run["inputs"]


def test_the_identity_changes_with_a_source_file(pipeline):
    Path("tinyllm").unlink()
    shutil.copytree(ROOT / "tinyllm", "tinyllm", ignore=shutil.ignore_patterns("__pycache__"))
    params = load_params(Params, paths.PARAMS)
    before = identity("pretrain", params, [paths.TOKENS])
    file = Path("tinyllm/training/step.py")
    file.write_text(file.read_text() + "# changed\n")
    after = identity("pretrain", params, [paths.TOKENS])
    changed = [path for path in before["code"] if before["code"][path] != after["code"][path]]
    assert changed == ["tinyllm/training"]


def test_the_probe_is_spread_over_a_large_split_and_all_of_a_small_one(pipeline):
    tokenizer = Tokenizer.load(paths.TOKENIZER)
    val = TokenShards.open(paths.TOKENS, "val", None)
    small = Probe(val, tokenizer, 16, "fp32")
    assert small.n_tokens == val.n_tokens < PROBE_TOKENS
    assert small.n_bytes == val.n_bytes
    write_tokens(n_words=30000)
    large = TokenShards.open(paths.TOKENS, "val", None)
    probe = Probe(large, tokenizer, 16, "fp32")
    assert probe.n_tokens == PROBE_TOKENS < large.n_tokens
    assert probe.n_bytes / probe.n_tokens == pytest.approx(large.n_bytes / large.n_tokens, rel=0.02)
    last = large.stream.read(large.n_tokens - 16, large.n_tokens)
    assert (probe.stream.read(PROBE_TOKENS - 16, PROBE_TOKENS) == last).all()


def test_another_kind_of_model_trains_on_documents_apart(pipeline, monkeypatch):
    seen = []
    real = Stepper.run

    def run(self, step, batches, *others):
        seen.extend(batch.document_ids for batch in batches)
        return real(self, step, batches, *others)

    monkeypatch.setattr(Stepper, "run", run)
    model = {"attention": "mla", "window": 8, "dropout": 0.1, "ffn": "relu2"}
    write_params(model=model, pretrain={"steps": 6, "mask_documents": True})
    pretrain()
    assert len(seen) == 6
    assert all(documents.shape == (4, 16) for documents in seen)
    config = load_model(paths.PRETRAIN).config
    assert config.mla is not None
    assert (config.window, config.ffn) == (8, "relu2")
