"""Training that is killed under DVC and started again ends like training that was not."""

import hashlib
import os
import random
import signal
import subprocess
import time

import psutil
import pytest

pytestmark = pytest.mark.slow
N_KILLS = 20
STAGES = ("pretrain", "sft", "lora")
RESULTS = (
    "data/models/pretrain/model.safetensors",
    "data/models/sft/model.safetensors",
    "data/models/lora/merged/model.safetensors",
    "data/models/lora/adapter/adapter_model.safetensors",
    "reports/pretrain/curve.tsv",
    "reports/sft/curve.tsv",
    "reports/lora/curve.tsv",
)


def digests(root):
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in RESULTS}


def trainer(dvc: subprocess.Popen, stage: str, timeout_s: float) -> psutil.Process | None:
    """Return the process of a stage once it has begun, or None if it never shows up."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and dvc.poll() is None:
        for child in psutil.Process(dvc.pid).children(recursive=True):
            try:
                if f"stages.{stage}" in child.cmdline() and "python" in child.name():
                    return child
            except psutil.Error:
                continue
        time.sleep(0.02)
    return None


def start(project, *command):
    return subprocess.Popen(
        command,
        cwd=project.root,
        env=project.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "command", [("dvc", "repro", "lora"), ("dvc", "exp", "run", "lora")], ids=" ".join
)
def test_random_kills_end_bit_identical(fresh, built, command):
    draw = random.Random(11)
    expected = digests(built)
    for name in ("pretrain", "sft", "lora"):
        fresh.set(**{f"{name}__steps": 40})
    killed = 0
    for round_ in range(N_KILLS // 2):
        stage = STAGES[round_ * len(STAGES) // (N_KILLS // 2)]
        dvc = start(fresh, *command)
        process = trainer(dvc, stage, timeout_s=120)
        if process is None:
            dvc.wait()
            continue
        time.sleep(draw.uniform(1.5, 6.0))  # from the imports to the last steps
        if draw.random() < 0.5:
            os.killpg(dvc.pid, signal.SIGKILL)
        elif process.is_running():
            process.kill()
        killed += 1
        dvc.wait()
        fresh.run(
            "git", "switch", "-q", "main", check=False
        )  # a killed `exp run` leaves HEAD detached
    fresh.run(*command)
    assert killed >= 3
    assert digests(fresh.root) == expected


def test_killing_only_dvc_leaves_no_trainer_behind(fresh):
    fresh.set(pretrain__steps=100000)
    dvc = start(fresh, "dvc", "repro", "pretrain")
    process = trainer(dvc, "pretrain", timeout_s=120)
    assert process is not None
    time.sleep(5)
    os.kill(dvc.pid, signal.SIGKILL)
    dvc.wait()
    process.wait(timeout=15)


def test_a_second_trainer_on_the_same_state_is_refused(fresh):
    fresh.set(pretrain__steps=100000)
    dvc = start(fresh, "dvc", "repro", "pretrain")
    process = trainer(dvc, "pretrain", timeout_s=120)
    assert process is not None
    time.sleep(5)
    second = fresh.run("python", "-m", "stages.pretrain", check=False)
    os.killpg(dvc.pid, signal.SIGKILL)
    assert second.returncode == 2
    assert len(second.stderr.strip().splitlines()) >= 1
    assert "Traceback" not in second.stderr
