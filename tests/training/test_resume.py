"""A run that dies and goes on ends with the bits of a run that never died."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

TRAINER = Path(__file__).with_name("tiny_trainer.py")
FINISHED = "tiny: RESUME at step 24"


def attempts(folder, *plans):
    """Carry out the plans one after the other on one stored state."""
    hidden = ("TINYLLM_INFLIGHT", "TINYLLM_FRESH", "TINYLLM_THREADS", "TINYLLM_DEVICE", "DVC_STAGE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["PYTHONPATH"] = str(TRAINER.parents[2])  # this tree, not an installed one
    done = subprocess.run(
        [sys.executable, str(TRAINER), str(folder)],
        input=json.dumps(plans),
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    (outcome,) = attempts(tmp_path_factory.mktemp("undisturbed"), {})
    assert outcome["code"] == 0
    return outcome["hash"]


def test_deaths_at_every_kind_of_moment(tmp_path, undisturbed):
    plans = [
        {"death": "at batch", "n": 13},
        {"death": "in save", "n": 1},
        {"death": "before rename", "n": 2},
        {"death": "in removal", "n": 1},
        {"death": "after rename", "n": 1},
        {"death": "at batch", "n": 41},
        {},
    ]
    outcomes = attempts(tmp_path, *plans)
    assert [outcome["code"] for outcome in outcomes] == [-9] * (len(plans) - 1) + [0]
    assert outcomes[-1]["hash"] == undisturbed
    assert outcomes[-1]["said"][0].startswith("tiny: RESUME at step ")
    assert not list(tmp_path.glob("inflight/tiny/*/.tmp-*"))


def test_signals_save_the_step_they_interrupt(tmp_path, undisturbed):
    plans = [{"death": "TERM", "n": 14}, {"death": "INT", "n": 24}, {}, {}]
    term, interrupt, whole, again = attempts(tmp_path, *plans)
    assert (term["code"], interrupt["code"]) == (143, 130)
    assert interrupt["said"][0] == "tiny: RESUME at step 8"  # batch 14 is the first half of step 8
    assert whole["said"][0] == "tiny: RESUME at step 13"
    assert whole["hash"] == again["hash"] == undisturbed
    assert again["said"][0] == FINISHED  # finished state is kept: nothing is trained again
    assert again["metrics"]["seconds"] == whole["metrics"]["seconds"]


EVERYTHING = {
    **{"checkpoint": "selective", "ema_decay": 0.9, "spike_factor": 1.1, "diagnostics": True},
    "preflight": True,
}
slow = pytest.mark.slow  # fp16 has no fast products on most CPUs, bitsandbytes imports for seconds


@pytest.mark.parametrize(
    "over",
    [
        EVERYTHING,
        pytest.param({"precision": "fp16"}, marks=slow),
        pytest.param({"optimizer": "adamw8bit", "precision": "fp32"}, marks=slow),
        pytest.param({"optimizer": "adamw", "precision": "fp32", "accumulate": 1}, marks=slow),
        pytest.param({"schedule": "cosine", "clip_norm": 0.0}, marks=slow),
        pytest.param({"checkpoint": "blocks"}, marks=slow),
        pytest.param({"checkpoint": "selective"}, marks=slow),
        pytest.param({"ema_decay": 0.9}, marks=slow),
        pytest.param({"spike_factor": 1.1}, marks=slow),
        pytest.param({"diagnostics": True}, marks=slow),
        pytest.param({"preflight": True}, marks=slow),
        pytest.param({**EVERYTHING, "precision": "fp16"}, marks=slow),
    ],
    ids=lambda over: ",".join(map(str, over.values())),
)
def test_other_states_resume_to_the_same_bits(tmp_path, over):
    at = 16 * over.get("accumulate", 2) + 1
    killed = {"death": "at batch", "n": at, "over": over}
    dead, resumed = attempts(tmp_path, killed, {"over": over})
    (whole,) = attempts(tmp_path / "whole", {"over": over})
    assert dead["code"] == -9
    assert resumed["said"][0] == "tiny: RESUME at step 15"
    assert resumed["hash"] == whole["hash"] is not None


def test_other_knobs_begin_anew_and_are_named_but_log_knobs_and_threads_resume(tmp_path):
    killed, rate = {"death": "at batch", "n": 33}, {"over": {"lr": 0.01, "steps": 20}}
    saving = {"over": {"save_every": 7, "log_every": 2}, "threads": 1}
    _, other, same = attempts(tmp_path, killed, rate, saving)
    assert other["said"][0] == (
        "tiny: FRESH; another run is stored at step 15: tiny.lr 0.003 -> 0.01, tiny.steps 24 -> 20"
    )
    assert same["said"][0] == "tiny: RESUME at step 15"
    assert "began on cpu, 1 process, 2 threads; the last bits may differ" in same["said"][2]


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["plain", "everything"])
def test_compiled_runs_resume_to_the_same_bits(tmp_path, more):
    over = {**more, "compile": "on"}
    (whole,) = attempts(tmp_path / "whole", {"over": over})
    deaths = [("at batch", 15), ("in save", 2), ("at batch", 35), ("TERM", 41), (None, 0)]
    plans = [{"death": death, "n": n, "over": over} for death, n in deaths]
    outcomes = attempts(tmp_path, *plans)
    assert [outcome["code"] for outcome in outcomes] == [-9, -9, -9, 143, 0]
    assert outcomes[-1]["said"][0] == "tiny: RESUME at step 21"
    assert "compiled" in outcomes[-1]["said"][1]
    assert outcomes[-1]["metrics"]["compiled"] == 1
    assert outcomes[-1]["hash"] == whole["hash"] is not None


@pytest.mark.slow
def test_twenty_random_kills(tmp_path):
    draw, over = random.Random(4), {"steps": 400, "save_every": 3}
    (whole,) = attempts(tmp_path / "whole", {"over": over})
    longest_s = whole["metrics"]["seconds"] / 8
    kills = [{"over": over, "after_s": 0.2 + draw.uniform(0, longest_s)} for _ in range(20)]
    outcomes = attempts(tmp_path, *kills, {"over": over})
    assert [outcome["code"] for outcome in outcomes[:-1]].count(-9) >= 10
    assert outcomes[-1]["hash"] == whole["hash"] is not None
