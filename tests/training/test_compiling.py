from dataclasses import replace

import pytest
import torch
from tiny_trainer import CONFIG, KNOBS

from tinyllm.model.init import build_model
from tinyllm.training.compiling import should_compile
from tinyllm.training.params import TrainingParams
from tinyllm.training.speed import flops_per_token, median_step_s

CPU = torch.device("cpu")
AUTO = TrainingParams(**{**KNOBS, "compile": "auto"})
SHIPPED = replace(AUTO, steps=2000, seq_len=256, batch_size=8, accumulate=1)


def test_auto_compiles_long_runs_only_and_on_and_off_are_obeyed():
    assert should_compile(SHIPPED, 36_000_000, CPU)
    assert not should_compile(replace(SHIPPED, steps=200), 36_000_000, CPU)
    assert not should_compile(SHIPPED, 36_000_000, torch.device("cuda"))
    assert should_compile(replace(AUTO, compile="on"), 1, CPU)
    assert not should_compile(replace(SHIPPED, compile="off"), 36_000_000, CPU)


def test_flops_are_six_per_weight_and_four_for_a_frozen_one():
    model = build_model(CONFIG, 0)
    block = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64  # q o, k v, ffn
    attention = 12 * 1 * 2 * 16 * 8
    assert flops_per_token(model, 8) == 6 * (block + 48 * 32) + attention
    model.layers.requires_grad_(False)
    assert flops_per_token(model, 8) == 4 * block + 6 * 48 * 32 + attention


def test_the_median_leaves_the_slow_start_out():
    assert median_step_s([30.0, *[1.0] * 9]) == 1.0
    assert median_step_s([2.0]) == 2.0


@pytest.mark.parametrize("auto", [True, False])
def test_the_decision_does_not_look_at_what_is_only_told(auto):
    quiet = replace(SHIPPED, log_every=1, save_every=0, compile="auto" if auto else "off")
    assert should_compile(quiet, 36_000_000, CPU) is auto
