import math
from dataclasses import replace

import pytest
import torch
from tiny_trainer import KNOBS

from tinyllm.training.params import TrainingParams
from tinyllm.training.schedule import lr_share

COSINE = TrainingParams(**{**KNOBS, "schedule": "cosine", "steps": 100, "warmup_steps": 10})
WSD = replace(COSINE, schedule="wsd", decay_share=0.4)


@pytest.mark.parametrize("params", [COSINE, WSD], ids=["cosine", "wsd"])
def test_warm_up_is_a_line_that_reaches_the_peak(params):
    assert [lr_share(step, params) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert lr_share(0, replace(params, warmup_steps=0)) == 1.0


def test_cosine_is_that_of_torch():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=0.1)
    params = replace(COSINE, min_lr_share=0.1)
    for step in range(10, 100):
        assert lr_share(step, params) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        reference.step()


def test_wsd_is_constant_then_a_line_that_would_reach_the_end():
    assert {lr_share(step, WSD) for step in range(9, 61)} == {1.0}
    assert lr_share(80, WSD) == pytest.approx(0.5)
    assert lr_share(99, WSD) == pytest.approx(1 / 40)
    assert lr_share(80, replace(WSD, min_lr_share=0.2)) == pytest.approx(0.6)
    assert lr_share(99, replace(WSD, decay_share=0.0)) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_step_of_short_runs_has_a_share(schedule, steps):
    params = replace(COSINE, schedule=schedule, steps=steps, warmup_steps=1, decay_share=1.0)
    assert all(0 < lr_share(step, params) <= 1 for step in range(steps))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"steps": 0}, "steps: must be at least 1, got 0"),
        ({"lr": 0.0}, "lr: must be above 0, got 0.0"),
        ({"lr": math.nan}, "lr: must be above 0, got nan"),
        ({"clip_norm": -1.0}, "clip_norm: must be at least 0, got -1.0"),
        ({"beta2": 1.0}, "beta2: must be at least 0 and below 1, got 1.0"),
        ({"decay_share": 1.5}, "decay_share: a share, must be from 0 to 1, got 1.5"),
        ({"warmup_steps": 101}, "warmup_steps: 101 is more than steps = 100"),
    ],
    ids=str,
)
def test_impossible_knobs_are_refused_by_name(change, line):
    with pytest.raises(ValueError, match=r"^\w+: ") as refused:
        replace(COSINE, **change)
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)
