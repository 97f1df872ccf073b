import pytest
import torch
from tiny_trainer import CONFIG, KNOBS, CountingBatches, run_tiny
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tinyllm.model.init import build_model
from tinyllm.progress import Silent
from tinyllm.training.average import WeightAverage
from tinyllm.training.params import TrainingParams
from tinyllm.training.step import Stepper

DECAY = 0.9


def test_it_is_torchs_average_after_the_first_steps():
    model = nn.Linear(3, 2)
    ours = WeightAverage(model, DECAY)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    theirs.update_parameters(model)  # its first call copies
    for step in range(100, 110):  # (1 + 100) / (10 + 100) is above 0.9
        with torch.no_grad():
            model.weight.add_(1.0)
        ours.update(step)
        theirs.update_parameters(model)
    for one, other in zip(ours.means.values(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(ours.means["weight"], model.weight)


def test_the_start_is_forgotten():
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, 0.999)
    nn.init.constant_(model.weight, 5.0)
    for step in range(30):
        average.update(step)
    assert average.means["weight"].item() == pytest.approx(5.0, abs=1e-3)


def test_the_evaluated_and_returned_model_is_the_average_and_training_goes_on_without_it(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TINYLLM_INFLIGHT", str(tmp_path / "plain"))
    plain, plain_result, _ = run_tiny()
    monkeypatch.setenv("TINYLLM_INFLIGHT", str(tmp_path / "average"))
    average, result, _ = run_tiny({"ema_decay": DECAY})
    knobs = TrainingParams(**{**KNOBS, "ema_decay": DECAY})
    ours = Stepper(
        build_model(CONFIG, seed=5),
        knobs,
        torch.device("cpu"),
        compiled=False,
        progress=Silent(),
    )
    for step in range(knobs.steps):
        ours.run(step, [CountingBatches(knobs).batch(2 * step + i) for i in range(2)])
    assert all(map(torch.equal, ours.model.parameters(), plain.parameters()))
    assert all(map(torch.equal, ours.average.means.values(), average.parameters()))
    total = sum(parameter.detach().double().sum() for parameter in average.parameters())
    assert result.curve[-1]["val_loss"] == float(total)
    losses = [[row.get("train_loss") for row in r.curve] for r in (plain_result, result)]
    assert losses[0] == losses[1]
