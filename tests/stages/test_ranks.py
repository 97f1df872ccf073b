"""A stage that starts its ranks: what it says, its exit code, and nobody left behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_pretrain import make_tokenizer, write_params
from tiny_dirs import write_tokens

from stages.ranks import _blame, ranks_wanted
from tinyllm.errors import Interrupted, TinyllmError

ROOT = Path(__file__).parent.parent.parent
PATIENCE_S = 300
"""How long two ranks may take to start and end; an idle machine needs a tenth."""


@pytest.mark.parametrize(
    ("failures", "code", "says"),
    [
        ({0: (1, ""), 1: (2, "lr: too high")}, None, "lr: too high"),
        ({0: (1, ""), 1: (-signal.SIGKILL, "")}, 137, "rank 1 was killed by SIGKILL; run again"),
        ({0: (-signal.SIGTERM, ""), 1: (-signal.SIGSEGV, "")}, 139, "rank 1 was killed by SIGSEGV"),
        ({0: (143, ""), 1: (143, "")}, 143, ""),
        ({0: (1, ""), 1: (1, "")}, 1, ""),
        ({1: (-signal.SIGTERM, "")}, 1, ""),
    ],
)
def test_the_first_cause_is_blamed(failures, code, says):
    with pytest.raises(TinyllmError) as blamed:
        _blame(failures)
    assert str(blamed.value).startswith(says)
    assert getattr(blamed.value, "code", None) == code
    assert isinstance(blamed.value, Interrupted) == (code is not None)


def test_ranks_are_started_once_and_only_when_asked_for(monkeypatch):
    for name in ("RANK", "TINYLLM_NPROC"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_wanted() == 0
    monkeypatch.setenv("TINYLLM_NPROC", "2")
    assert ranks_wanted() == 2
    monkeypatch.setenv("RANK", "0")  # this is one of them
    assert ranks_wanted() == 0
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("TINYLLM_NPROC", "two")
    with pytest.raises(TinyllmError, match="TINYLLM_NPROC: 'two' is not a number"):
        ranks_wanted()


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Return a function that starts the stage in a folder with all it needs."""
    monkeypatch.chdir(tmp_path)
    make_tokenizer()
    write_tokens()
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    for package in ("stages", "tinyllm"):
        Path(package).symlink_to(ROOT / package)
    hidden = ("TINYLLM_INFLIGHT", "TINYLLM_FRESH", "DVC_STAGE", "DVC_ROOT", "RANK")
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}

    def start(steps, *command, **environment):
        sizes = {"n_heads": 4, "n_kv_heads": 2}
        often = {"save_every": 4, "steps": steps, "precision": "fp32", "log_every": 1}
        write_params(model=sizes, pretrain=often)
        return subprocess.Popen(
            command or (sys.executable, "-m", "stages.pretrain"),
            env={**inherited, "TINYLLM_THREADS": "1", **environment},
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def ranks_of(process):
    """Return the ranks of a stage as soon as they train."""
    for line in process.stderr:
        if line.startswith("pretrain 1/") or "/100000" in line:
            break
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in children if "stages.pretrain" in " ".join(child.cmdline())]
    return sorted(ranks, key=lambda rank: int(rank.environ()["RANK"]))


def wait_for_a_checkpoint():
    deadline = time.monotonic() + PATIENCE_S
    while not list(Path(".inflight/pretrain").glob("*/step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_one_command_trains_on_two_ranks_and_torchrun_by_hand_does_too(stage):
    by_stage = stage(8, TINYLLM_NPROC="2", TINYLLM_PARALLEL="fsdp")
    _, said = by_stage.communicate(timeout=PATIENCE_S)
    assert by_stage.returncode == 0, said
    assert said.count("pretrain: FRESH") == 1  # rank 0 alone talks
    assert "2 processes, fsdp 2" in said
    first = Path("data/models/pretrain/model.safetensors").read_bytes()
    assert Path("reports/pretrain/metrics.json").exists()
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    command = (*torchrun, "--nproc-per-node", "2", "-m", "stages.pretrain")
    by_hand = stage(8, *command, TINYLLM_PARALLEL="fsdp", TINYLLM_FRESH="1")
    _, said = by_hand.communicate(timeout=PATIENCE_S)
    assert by_hand.returncode == 0, said
    assert Path("data/models/pretrain/model.safetensors").read_bytes() == first


@pytest.mark.slow
def test_a_mistake_is_one_line_and_code_2(stage):
    wrong = stage(8, TINYLLM_NPROC="3", TINYLLM_TP="2")
    _, said = wrong.communicate(timeout=PATIENCE_S)
    assert (wrong.returncode, said) == (2, "error: TINYLLM_TP: '2' does not divide the 3 ranks\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number", "code", "says"),
    [
        ("stage", signal.SIGTERM, 143, "pretrain: SIGTERM: stopped at step"),
        ("stage", signal.SIGINT, 130, "pretrain: SIGINT: stopped at step"),
        ("stage", signal.SIGKILL, -9, "pretrain: the process that started the ranks is gone"),
        (1, signal.SIGKILL, 137, "rank 1 was killed by SIGKILL; run again"),
        (1, signal.SIGTERM, 143, "pretrain: another rank was stopped: stopped at step"),
    ],
)
def test_whoever_is_killed_nobody_is_left_and_the_run_goes_on(stage, victim, number, code, says):
    team = stage(100000, TINYLLM_NPROC="2", TINYLLM_PARALLEL="fsdp")
    ranks = ranks_of(team)
    assert len(ranks) == 2
    wait_for_a_checkpoint()
    (psutil.Process(team.pid) if victim == "stage" else ranks[victim]).send_signal(number)
    _, said = team.communicate(timeout=PATIENCE_S)
    lines = [line for line in said.splitlines() if not line.startswith("pretrain ")]
    assert team.returncode == code, said
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {says}")
    assert not psutil.wait_procs(ranks, timeout=PATIENCE_S)[1]
    again = stage(100000, TINYLLM_NPROC="2", TINYLLM_TP="2")
    first = again.stderr.readline()
    ranks = ranks_of(again)
    again.kill()
    assert first.startswith("pretrain: RESUME at step")
    assert not psutil.wait_procs(ranks, timeout=PATIENCE_S)[1]
