"""Training that is killed under DVC and started again ends like training that was not."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import time

import psutil
import pytest

pytestmark = pytest.mark.slow
N_KILLS = 20
LONGEST_S = 4.0  # about what the 200 steps of a stage take
RESULTS = {
    "pretrain": ("data/models/pretrain/model.safetensors", "reports/pretrain/curve.tsv"),
    "sft": ("data/models/sft/model.safetensors", "reports/sft/curve.tsv"),
    "lora": (
        "data/models/lora/merged/model.safetensors",
        "data/models/lora/adapter/adapter_model.safetensors",
        "reports/lora/curve.tsv",
    ),
}
COMMANDS = (("dvc", "repro", "-f", "-s"), ("dvc", "exp", "run", "-f", "-s"))


def digests(root, stage):
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in RESULTS[stage]}


def start(project, *command):
    return subprocess.Popen(
        command,
        cwd=project.root,
        env=project.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for_training(project, dvc, stage, timeout_s=300) -> psutil.Process:
    """Return the trainer's process as soon as it has taken the lock of its run."""
    deadline = time.monotonic() + timeout_s
    while not list(project.root.glob(f".inflight/{stage}/*/identity.json")):
        assert dvc.poll() is None, f"dvc ended before {stage} began"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(dvc.pid).children(recursive=True)
    return next(child for child in children if f"stages.{stage}" in " ".join(child.cmdline()))


@pytest.mark.parametrize("number", range(N_KILLS))
def test_a_random_kill_ends_bit_identical(project, built, number, record_property):
    draw = random.Random(number)
    stage, command = sorted(RESULTS)[number % 3], COMMANDS[number % 2]
    for memory in (".inflight", ".dvc/cache/runs"):  # train anew, not from a cache
        shutil.rmtree(project.root / memory)
    dvc = start(project, *command, stage)
    process = wait_for_training(project, dvc, stage)
    time.sleep(draw.uniform(0, LONGEST_S))
    if draw.random() < 0.5:
        os.killpg(dvc.pid, signal.SIGKILL)
    elif process.is_running():
        process.kill()
    dvc.wait()
    project.run("git", "switch", "-q", "main", check=False)  # a killed `exp run` detaches HEAD
    again = project.run(*command, stage)
    said = [line for line in (again.stdout + again.stderr).splitlines() if line.startswith(stage)]
    record_property("said", said[0])
    print(f"kill {number}: {' '.join(command)} {stage}: then {said[0]}")
    assert digests(project.root, stage) == digests(built, stage)


def test_killing_only_dvc_leaves_no_trainer_behind(fresh):
    fresh.set(pretrain__steps=100000)
    dvc = start(fresh, "dvc", "repro", "pretrain")
    process = wait_for_training(fresh, dvc, "pretrain")
    time.sleep(2)
    os.kill(dvc.pid, signal.SIGKILL)
    dvc.wait()
    process.wait(timeout=120)


def test_a_second_trainer_on_the_same_state_is_refused(fresh):
    fresh.set(pretrain__steps=100000)
    dvc = start(fresh, "dvc", "repro", "pretrain")
    wait_for_training(fresh, dvc, "pretrain")
    second = fresh.run("python", "-m", "stages.pretrain", check=False)
    os.killpg(dvc.pid, signal.SIGKILL)
    assert second.returncode == 2
    assert "another process trains this very run" in second.stderr
    assert "Traceback" not in second.stderr
