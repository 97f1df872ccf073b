"""The pipeline under a real DVC: what runs again, what comes from the cache, experiments, diffs."""

import json
import shutil
import time

import pytest
from processor_time import processor_s

from tinyllm.params import read_yaml

pytestmark = pytest.mark.slow
AFTER_SFT = ["sft", "lora", "quantize", "export", "benchmark", "report"]


def test_a_second_repro_runs_nothing_and_is_quick(project):
    project.run("dvc", "repro")  # a moved repository is hashed once
    before_s = processor_s()
    done = project.run("dvc", "repro")
    assert project.stages_run(done) == []
    assert processor_s() - before_s < 5  # 2 s; the clock would count what else the machine does


def test_importing_the_code_changes_nothing(project):
    project.run(
        "python", "-c", "import tinyllm.training.loop, stages.pretrain, tinyllm.corpus.fetch"
    )
    assert "up to date" in project.run("dvc", "status").stdout


def test_a_knob_of_sft_leaves_everything_before_it_alone(project):
    project.set(sft__lr=3e-5)
    done = project.run("dvc", "repro")
    assert project.stages_run(done) == AFTER_SFT
    assert "sft.lr" in project.run("dvc", "params", "diff").stdout


def test_there_and_back_comes_from_the_run_cache(project):
    before = read_yaml(project.root / "dvc.lock")["stages"]
    project.set(pretrain__lr=1e-3)
    assert "pretrain" in project.stages_run(project.run("dvc", "repro"))
    project.run("git", "checkout", "-q", "params.yaml")
    done = project.run("dvc", "repro")
    assert not {"pretrain", "sft", "lora"} & set(project.stages_run(done))
    after = read_yaml(project.root / "dvc.lock")["stages"]
    assert after["lora"]["outs"] == before["lora"]["outs"]


def test_an_experiment_is_one_row_and_diffs_show_it(project):
    project.run("dvc", "exp", "run", "-n", "wide", "-S", "model.d=64", "-S", "pretrain.steps=5")
    shown = json.loads(project.run("dvc", "exp", "show", "--json").stdout)
    names = [row["name"] for commit in shown for row in (commit.get("experiments") or [])]
    assert names == ["wide"]
    changed = json.loads(project.run("dvc", "metrics", "diff", "--json").stdout)
    assert "reports/pretrain/metrics.json" in changed
    project.run("dvc", "plots", "diff", "HEAD", "-o", "page")
    page = (project.root / "page/index.html").read_text()
    assert "reports/pretrain/curve.tsv" in page
    assert "src=" not in page  # opens without a network
    params = json.loads(project.run("dvc", "params", "diff", "--json").stdout)["params.yaml"]
    assert params["model.d"] == {"old": 32, "new": 64, "diff": 32}


def test_a_temporary_experiment_runs_its_own_code_and_leaves_the_workspace(project):
    marker = "changed on purpose"
    stage = project.root / "stages/report.py"
    stage.write_text(stage.read_text() + f"\n# {marker}\n")
    before = (project.root / "params.yaml").read_text()
    project.run("dvc", "exp", "run", "--temp", "-n", "aside", "-S", "sft.lr=1e-4")
    assert (project.root / "params.yaml").read_text() == before
    listed = project.run("git", "show", "refs/exps/exec/EXEC_BASELINE", check=False)
    assert listed.returncode != 0
    assert "aside" in project.run("dvc", "exp", "list", "--name-only").stdout


def test_a_queue_runs_a_grid(project):
    project.run("dvc", "exp", "run", "--queue", "-n", "grid", "-S", "sft.lr=1e-4,2e-4")
    project.run("dvc", "queue", "start")
    deadline = time.monotonic() + 300
    while (
        "Running" in (status := project.run("dvc", "queue", "status").stdout) or "Queued" in status
    ):
        assert time.monotonic() < deadline, status
        time.sleep(2)
    assert status.count("Success") == 2
    logs = project.run("dvc", "queue", "logs", "grid-1").stdout
    assert "\x1b" not in logs


def test_push_and_pull_through_a_local_remote(project, tmp_path):
    project.run("dvc", "remote", "add", "-d", "store", str(tmp_path / "store"))
    project.commit("remote")
    project.run("dvc", "push", "-q")
    clone = tmp_path / "clone"
    project.run("git", "clone", "-q", str(project.root), str(clone))
    other = type(project)(clone, project.environment)
    other.run("dvc", "pull", "-q")
    assert "up to date" in other.run("dvc", "status").stdout
    shutil.rmtree(clone / "data")
    assert project.stages_run(other.run("dvc", "repro", "--pull", "--allow-missing")) == []


def test_a_fresh_clone_knows_that_nothing_is_to_do(project, tmp_path):
    project.run("git", "clone", "-q", str(project.root), str(tmp_path / "clone"))
    other = type(project)(tmp_path / "clone", project.environment)
    done = other.run("dvc", "repro", "--dry", "--allow-missing")
    assert project.stages_run(done) == []
    source = tmp_path / "clone/tinyllm/training/loop.py"
    source.write_text(source.read_text() + "\n# touched\n")
    done = other.run("dvc", "repro", "--dry", "--allow-missing", check=False)
    assert "pretrain" in done.stdout or "data/tokens" in done.stderr  # it would run, or misses data
    assert "Stage 'pretrain' didn't change" not in done.stdout


def test_metric_names_are_unique_and_are_no_parameters(project):
    def flatten(value, prefix):
        if not isinstance(value, dict):
            return [prefix]
        return [name for key, item in value.items() for name in flatten(item, f"{prefix}.{key}")]

    files = sorted(project.root.glob("reports/*/metrics.json"))
    names = [name for path in files for name in flatten(json.loads(path.read_text()), "")]
    params = set(flatten(read_yaml(project.root / "params.yaml"), ""))
    assert len(files) >= 12
    assert len(names) == len(set(names))
    assert not set(names) & params


def test_hand_runs_over_linked_outputs_leave_the_cache_whole(project):
    project.run("dvc", "config", "--local", "cache.type", "hardlink,copy")
    project.run("dvc", "checkout", "--relink")
    for stage in ("clean", "encode", "chat_data", "quantize", "report"):
        project.run("python", "-m", f"stages.{stage}", DVC_STAGE="")
    import hashlib

    for path in (project.root / ".dvc/cache/files/md5").rglob("*"):
        if path.is_file() and not path.name.endswith(".dir"):
            assert hashlib.md5(path.read_bytes()).hexdigest() == path.parent.name + path.name
