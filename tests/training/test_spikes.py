import statistics

import pytest
import torch
from tiny_trainer import CONFIG, KNOBS, CountingBatches, run_tiny

from tinyllm.model.init import build_model
from tinyllm.progress import Silent
from tinyllm.training.params import TrainingParams
from tinyllm.training.spikes import LEAST, WINDOW, count_skipped, largest_norm
from tinyllm.training.step import Stepper


def test_the_limit_is_a_multiple_of_the_recent_median():
    norms = torch.rand(200)
    limit = largest_norm(norms, 120, 3.0)
    assert float(limit) == pytest.approx(3 * sorted(norms[70:120].tolist())[24])
    assert WINDOW == 50  # of an even number torch takes the lower of the two in the middle
    assert float(limit) / 3 <= statistics.median(norms[70:120].tolist())
    assert largest_norm(norms, 120, 0.0) is None
    assert largest_norm(norms, LEAST - 1, 3.0) is None


def test_outliers_are_counted_and_a_new_level_becomes_usual():
    norms = torch.ones(100)
    norms[[5, 40, 60]] = 10.0  # 5: before anything is judged
    assert count_skipped(norms, 3.0) == 2
    assert count_skipped(norms, 0.0) == 0
    norms = torch.cat([torch.ones(100), torch.full((100,), 10.0)])
    assert count_skipped(norms, 3.0) == WINDOW // 2 + 1


def test_a_step_beyond_the_limit_changes_nothing():
    knobs = TrainingParams(**KNOBS)
    ours = Stepper(
        build_model(CONFIG, 0), knobs, torch.device("cpu"), compiled=False, progress=Silent()
    )
    batch = CountingBatches(knobs).batch(0)
    before = [parameter.detach().clone() for parameter in ours.model.parameters()]
    _, norm = ours.run(0, [batch], torch.tensor(1e-6))
    assert norm > 1e-6
    assert all(map(torch.equal, before, ours.model.parameters()))
    assert all(not optimizer.state for optimizer in ours.optimizers)
    ours.run(1, [batch], norm)
    assert not any(map(torch.equal, before, ours.model.parameters()))


def test_a_poisoned_batch_is_skipped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLLM_INFLIGHT", str(tmp_path))

    real = CountingBatches.batch

    def batch(self, index):
        made = real(self, index)
        if index == 42:  # of step 21, the second that is judged
            made.targets[:] = made.targets[:, ::-1]  # nonsense: its gradient is large
        return made

    monkeypatch.setattr(CountingBatches, "batch", batch)
    over = {"spike_factor": 1.15, "lr": 0.02}
    _, result, _ = run_tiny(over)
    assert result.metrics["skipped_steps"] >= 1
    _, kept, _ = run_tiny({**over, "spike_factor": 0.0})
    assert kept.metrics["skipped_steps"] == 0
    assert kept.metrics["train_loss"] != result.metrics["train_loss"]
