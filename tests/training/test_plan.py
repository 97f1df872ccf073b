from dataclasses import replace

import pytest
import torch
from tiny_trainer import CONFIG, KNOBS

from tinyllm.model.init import build_model, count_parameters
from tinyllm.training import plan as plan_module
from tinyllm.training.memory import estimate_memory
from tinyllm.training.params import TrainingParams
from tinyllm.training.plan import count_by_part, describe, make_plan, measure_step_s

PARAMS = TrainingParams(**KNOBS)
CPU = torch.device("cpu")


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_the_parts_sum_to_all_parameters(tie_embeddings):
    model = build_model(replace(CONFIG, tie_embeddings=tie_embeddings), 0)
    parts = count_by_part(model)
    assert sum(parts.values()) == count_parameters(model)
    assert ("lm_head" in parts) is not tie_embeddings
    assert parts["feed-forward"] == 3 * 32 * 64


def test_the_largest_batch_fits_and_a_fifth_more_does_not(monkeypatch):
    room = 3_000_000
    monkeypatch.setattr(plan_module, "free_bytes", lambda device: room)
    largest = make_plan(CONFIG, PARAMS, CPU).largest_batch_size
    limit = room * (1 - plan_module.RESERVE_SHARE)
    assert estimate_memory(CONFIG, PARAMS, largest).total <= limit
    assert estimate_memory(CONFIG, PARAMS, 2 + largest * 6 // 5).total > limit
    monkeypatch.setattr(plan_module, "free_bytes", lambda device: 1000)
    assert make_plan(CONFIG, PARAMS, CPU).largest_batch_size == 0


def test_the_lines_tell_steps_and_hours():
    plan = make_plan(CONFIG, PARAMS, CPU)
    step_s = measure_step_s(CONFIG, PARAMS, CPU, 0.05)
    assert 0 < step_s < 10
    text = "\n".join(describe(plan, PARAMS, 3600.0))
    assert "24 of 64 tokens" in text
    assert "24.00 h" in text
    assert "not measured" in "\n".join(describe(plan, PARAMS, None))
