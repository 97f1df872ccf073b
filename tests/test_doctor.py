"""Each leftover of a crash is made in a repository of its own; the doctor must name its repair."""

import fcntl
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllm.doctor.examine import _examine_params
from tinyllm.doctor.leftovers import examine_cache, examine_repository
from tinyllm.doctor.machine import examine_machine, examine_operations
from tinyllm.doctor.trainers import examine_trainers

ROOT = Path(__file__).parent.parent


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    return subprocess.run(
        ["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A healthy repository as DVC and Git see it, without running DVC."""
    root = tmp_path / "project"
    (root / ".dvc/tmp").mkdir(parents=True)
    (root / ".dvc/config").write_text("[core]\n    analytics = false\n    check_update = false\n")
    (root / ".dvc/.gitignore").write_text("/tmp\n/cache\n")
    (root / "params.yaml").write_text("seed: 1\n")
    git(tmp_path, "init", "--quiet", "--initial-branch=main", str(root))
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "begin")
    return root


def problems(root: Path):
    return [finding for finding in examine_repository(root) if finding.is_problem]


def repair_all(root: Path) -> None:
    """Run every printed repair, as a user would paste it."""
    for finding in problems(root):
        command = finding.repair.replace(f"{root}/", "")
        subprocess.run(["bash", "-c", command], cwd=root, check=True, capture_output=True)


def test_a_healthy_repository_has_no_problems(repository):
    before = sorted(repository.rglob("*"))
    assert problems(repository) == []
    assert sorted(repository.rglob("*")) == before


def test_a_killed_exp_run_leaves_a_detached_head(repository):
    head = git(repository, "rev-parse", "HEAD")
    git(repository, "update-ref", "refs/exps/exec/EXEC_BASELINE", head)
    git(repository, "update-ref", "refs/exps/exec/EXEC_HEAD", head)
    git(repository, "checkout", "--quiet", "--detach")
    first, second = problems(repository)
    assert "HEAD is detached" in first.text
    assert first.repair.startswith("git switch main")
    assert "2 refs of an unfinished experiment" in second.text
    repair_all(repository)
    assert problems(repository) == []
    assert git(repository, "branch", "--show-current") == "main"


def test_an_experiment_that_never_started_is_found(repository):
    git(repository, "update-ref", "refs/exps/stash", "HEAD")
    (repository / "params.yaml").write_text("seed: 2\n")
    git(repository, "stash")
    (found,) = problems(repository)
    assert "would run with the next one" in found.text
    assert any(
        "git stash has 1 entries" in finding.text for finding in examine_repository(repository)
    )
    repair_all(repository)
    assert problems(repository) == []


def test_an_empty_index_is_found(repository):
    (repository / ".git/index").write_bytes(b"")
    found = next(finding for finding in problems(repository) if "index" in finding.text)
    assert "empty" in found.text
    subprocess.run(["bash", "-c", found.repair], cwd=repository, check=True, capture_output=True)
    assert problems(repository) == []


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "not readable"),
        ('{"a": {"write": {"pid": ', "not readable"),
        (json.dumps({"data/raw": {"write": {"pid": 2**22 + 1, "cmd": "repro"}}}), "which is dead"),
        (
            json.dumps({"data/raw": {"read": [{"pid": os.getpid(), "cmd": "repro"}]}}),
            f"process {os.getpid()}, which is another program",
        ),
    ],
)
def test_a_stale_rwlock_is_found(repository, content, text):
    (repository / ".dvc/tmp/rwlock").write_text(content)
    (found,) = problems(repository)
    assert text in found.text
    repair_all(repository)
    assert not (repository / ".dvc/tmp/rwlock").exists()


def test_an_empty_rwlock_table_is_no_problem(repository):
    (repository / ".dvc/tmp/rwlock").write_text("{}")
    assert problems(repository) == []


def test_checkouts_of_killed_experiments_are_found(repository):
    (repository / ".dvc/tmp/exps/standalone/tmpabc/data").mkdir(parents=True)
    (found,) = problems(repository)
    assert found.repair == f"rm -r {repository}/.dvc/tmp/exps/standalone/tmpabc"
    repair_all(repository)
    assert problems(repository) == []


def test_a_running_dvc_is_not_judged(repository):
    (repository / ".dvc/tmp/exps/standalone/tmpabc").mkdir(parents=True)
    (repository / "dvc").write_text("import sys; print('up', flush=True); sys.stdin.read()")
    git(repository, "add", "dvc")
    with subprocess.Popen(
        [sys.executable, str(repository / "dvc"), "exp", "run"],
        cwd=repository,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as running:
        running.stdout.readline()
        lock = {"a": {"write": {"pid": running.pid, "cmd": "exp run"}}}
        (repository / ".dvc/tmp/rwlock").write_text(json.dumps(lock))
        assert problems(repository) == []
        texts = [finding.text for finding in examine_repository(repository)]
        assert any(f"dvc runs now (process {running.pid})" in text for text in texts)
        running.stdin.close()
    assert len(problems(repository)) == 2


def test_switches_that_let_dvc_call_home_are_found(repository):
    (repository / ".dvc/config").write_text("[core]\n    analytics = true\n")
    repairs = [finding.repair for finding in problems(repository)]
    assert repairs == [f"dvc config core.{key} false" for key in ("analytics", "check_update")]
    (repository / ".dvc/config.local").write_text(
        "[core]\n    analytics = false\n    check_update = false\n"
    )
    assert problems(repository) == []


def test_untracked_files_are_found(repository):
    (repository / "tinyllm").mkdir()
    (repository / "tinyllm/new.py").write_text("")
    (repository / "notes.txt").write_text("not of the pipeline")
    (found,) = problems(repository)
    assert "tinyllm/new.py" in found.text
    assert found.repair == "git add tinyllm"
    repair_all(repository)
    assert problems(repository) == []


def test_what_a_killed_stage_half_wrote_is_found(repository):
    (repository / f"data/models/sft.{2**22 + 1}.tmp").mkdir(parents=True)
    (repository / f"data/raw.{os.getpid()}.tmp").mkdir()  # its writer is alive
    (found,) = problems(repository)
    assert "sft.4194305.tmp: half-written" in found.text
    repair_all(repository)
    assert problems(repository) == []


def test_no_repository_is_said_and_no_problem(tmp_path):
    (found,) = examine_repository(tmp_path)
    assert "no DVC repository" in found.text
    assert not found.is_problem


HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "a")
fcntl.flock(lock, fcntl.LOCK_EX)
print("up", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the kernel shows no locks")
@pytest.mark.parametrize("by_dvc", [True, False])
def test_a_trainer_without_its_dvc_is_found(tmp_path, by_dvc):
    lock = tmp_path / ".inflight/pretrain/0123456789abcdef/.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert list(examine_trainers(tmp_path / ".inflight")) == []
    environment = {key: value for key, value in os.environ.items() if key != "DVC_STAGE"}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment | ({"DVC_STAGE": "pretrain"} if by_dvc else {}),
    ) as trainer:
        trainer.stdout.readline()
        (found,) = examine_trainers(tmp_path / ".inflight")
        assert f"process {trainer.pid} trains pretrain/0123456789abcdef" in found.text
        assert found.is_problem == by_dvc
        if by_dvc:
            assert shlex.split(found.repair, comments=True) == ["kill", str(trainer.pid)]
        trainer.stdin.close()
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # looking took no lock


def test_a_damaged_cache_object_is_found(repository):
    objects = repository / ".dvc/cache/files/md5"
    for name, content in {
        "5d/41402abc4b2a76b9719d911017c592": b"hello",
        "00/000000000000000000000000000000": b"not what the name says",
    }.items():
        (objects / name).parent.mkdir(parents=True)
        (objects / name).write_bytes(content)
    damaged, summary = examine_cache(repository)
    assert "00/0000" in damaged.text
    assert damaged.is_problem
    assert summary.text == "cache: 2 objects read"


def test_params_are_judged_as_the_stages_would(tmp_path):
    good = (ROOT / "params.yaml").read_text()
    path = tmp_path / "params.yaml"
    path.write_text(good)
    (fine,) = _examine_params(path)
    assert not fine.is_problem
    path.write_text(good.replace("n_layers: 6", "n_layer: 6", 1))
    found = list(_examine_params(path))
    assert all(finding.is_problem for finding in found)
    assert "model.n_layer: unknown parameter; did you mean n_layers?" in found[0].text


def test_the_machine_is_told(monkeypatch, tmp_path):
    texts = "\n".join(finding.text for finding in examine_machine(tmp_path))
    for word in ("python 3", "torch 2", "cores", "memory: ", "disk: ", "compiler: ", "GPU: "):
        assert word in texts
    monkeypatch.setenv("TINYLLM_KERNELS", "reference")
    rows = examine_operations()
    assert any(row.text == "linear_w8a8: reference (TINYLLM_KERNELS=reference)" for row in rows)


def test_too_little_disk_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 20, "total": 1 << 40})()
    )
    found = [finding for finding in examine_machine(tmp_path) if finding.is_problem]
    assert [finding.repair for finding in found] == ["dvc gc --workspace --all-experiments"]
