"""Teams of ranks on the CPU, with gloo, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_trainer import KNOBS

from tinyllm.errors import TrainingError
from tinyllm.shards.batches import Batch
from tinyllm.training.parallel import Team, _wanted_layout
from tinyllm.training.params import TrainingParams

TRAINER = Path(__file__).with_name("rank_trainer.py")
TWO_ULPS = 1e-6  # of a loss near 4, whose last bit is 2.4e-7: the bar
KNOBS_50 = {
    "steps": 50,
    "batch_size": 8,
    "accumulate": 1,
    "optimizer": "adamw",
    "precision": "fp32",
    "log_every": 1,
    "eval_every": 0,
    "save_every": 0,
}
ALONE = {"ranks": 0}
DDP = {"ranks": 2, "mode": "ddp"}
FSDP = {"ranks": 2, "mode": "fsdp"}
TENSOR = {"ranks": 2, "tp": 2}
BOTH = {"ranks": 4, "mode": "fsdp", "tp": 2}


def train(folder, *plans, **over):
    """Carry out the plans one after the other."""
    hidden = ("TINYLLM_INFLIGHT", "TINYLLM_FRESH", "TINYLLM_THREADS", "TINYLLM_DEVICE", "DVC_STAGE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["PYTHONPATH"] = str(TRAINER.parents[2])  # this tree, not an installed one
    whole = [{**plan, "over": {**KNOBS_50, **over, **plan.get("over", {})}} for plan in plans]
    done = subprocess.run(
        [sys.executable, str(TRAINER), str(folder)],
        input=json.dumps(whole),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def furthest(outcome, reference, what="curve"):
    return max(abs(a - b) for a, b in zip(outcome[what], reference[what], strict=True))


def test_every_layout_has_the_losses_of_one_process(tmp_path):
    layouts = [ALONE, DDP, FSDP, TENSOR, BOTH]
    plans = [{**layout, "place": str(i)} for i, layout in enumerate(layouts)]
    (alone, *teams), told = train(tmp_path, *plans)
    assert len(alone["curve"]) == 50
    assert alone["curve"][-1] < alone["curve"][0] - 1  # it learns: the comparison means something
    for outcome in teams:
        assert set(outcome["codes"]) == {0}, told
        assert furthest(outcome, alone) < TWO_ULPS, outcome["said"]
        # the norm before clipping, of which 1.0 is left
        assert furthest(outcome, alone, "norms") < 1e-5 * max(alone["norms"])
    assert max(alone["norms"]) > KNOBS["clip_norm"]


def test_a_run_goes_on_with_other_ranks_and_the_same_losses(tmp_path):
    (whole, *killed, last), told = train(
        tmp_path,
        {**ALONE, "place": "whole"},
        {**ALONE, "die": [0, 2 * 5]},  # at step 5; the last checkpoint is that of step 3
        {**BOTH, "die": [2, 2 * 8]},
        {**FSDP, "die": [1, 2 * 11]},
        {**TENSOR, "die": [0, 2 * 14]},
        ALONE,
        **{"steps": 16, "save_every": 3, "accumulate": 2, "ema_decay": 0.9},
    )
    assert [outcome["codes"].count(-9) for outcome in killed] == [1, 1, 1, 1]
    assert {code for outcome in killed for code in outcome["codes"]} == {-9, 1}
    assert "Traceback" not in told  # who loses a peer leaves quietly
    assert last["codes"] == [0]
    assert last["said"][0] == "tiny: RESUME at step 12"
    assert "began on cpu, 2 processes, tensor 2, 1 threads" in last["said"][2]
    assert furthest(last, whole) < TWO_ULPS
    assert not list(tmp_path.glob("*/tiny/*/.tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [DDP, FSDP, TENSOR, BOTH], ids=str)
def test_muon_gathers_the_matrix_and_gives_the_same_weights(tmp_path, layout):
    (alone, team), _ = train(
        tmp_path, {**ALONE, "place": "alone"}, {**layout, "place": "team"}, optimizer="muon"
    )
    # its update is rounded to bf16, where a difference in a gradient's last bit may turn one of 8
    assert furthest(team, alone) < 2**-8 * min(alone["curve"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": "selective"},
        {"batch_size": 5},
        {"accumulate": 3},
        {"clip_norm": 0.0},
        {"ema_decay": 0.9},
        {"diagnostics": True, "accumulate": 2},
        {"sizes": {"tie_embeddings": False}},
        {"sizes": {"qk_norm": False}},
    ],
    ids=str,
)
def test_every_layout_is_equal_with_other_settings_too(tmp_path, change):
    sizes = {"sizes": change.pop("sizes", {})}
    layouts = [ALONE, DDP, FSDP, TENSOR, BOTH]
    plans = [{**layout, **sizes, "place": str(i)} for i, layout in enumerate(layouts)]
    (alone, *teams), _ = train(tmp_path, *plans, **{"steps": 20, **change})
    for outcome in teams:
        assert furthest(outcome, alone) < TWO_ULPS


@pytest.mark.parametrize("n_data", [1, 2, 3, 4])
@pytest.mark.parametrize("n_tensor", [1, 2])
def test_the_rows_of_all_ranks_are_the_micro_batch_in_its_order(n_data, n_tensor):
    ids = np.arange(4 * 5).reshape(4, 5)
    batch = Batch(ids=ids, targets=ids + 1, document_ids=ids // 7)
    parts = [
        Team(rank=rank, size=n_data * n_tensor, n_tensor=n_tensor, mesh=object()).rows(batch)
        for rank in range(n_data * n_tensor)
    ]
    for name in ("ids", "targets", "document_ids"):
        rows = [getattr(part, name) for part in parts[::n_tensor]]
        assert (np.concatenate(rows) == getattr(batch, name)).all()
    for first, second in zip(parts[::n_tensor], parts[n_tensor - 1 :: n_tensor], strict=True):
        assert (first.ids == second.ids).all()  # one row of the grid sees the same


@pytest.mark.parametrize(
    ("layout", "over", "says"),
    [
        ({"size": 3}, {"batch_size": 2}, "x.batch_size: 2 rows are too few for 3 ranks"),
        ({"size": 2, "mode": "fsdp"}, {"optimizer": "adamw8bit"}, "x.optimizer: .* use .*ddp"),
        ({"size": 2, "n_tensor": 2}, {"precision": "fp16"}, "x.precision: fp16 .* or bf16"),
    ],
)
def test_what_a_layout_cannot_do_is_refused_with_what_works(layout, over, says):
    with pytest.raises(TrainingError, match=says):
        Team(mesh=object(), **layout).check(TrainingParams(**{**KNOBS, **over}), "x")


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"TINYLLM_PARALLEL": "zero"}, "'zero' is not one of ddp, fsdp"),
        ({"TINYLLM_TP": "3"}, "'3' does not divide the 4 ranks"),
        ({"TINYLLM_TP": "2"}, "use fsdp, or TINYLLM_TP=4"),
    ],
)
def test_a_grid_that_the_ranks_do_not_fill_is_refused(monkeypatch, environment, says):
    for name in ("TINYLLM_PARALLEL", "TINYLLM_TP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=says):
        _wanted_layout(4)
