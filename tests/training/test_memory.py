import importlib.util
from pathlib import Path

import pytest
from tiny_trainer import CONFIG, KNOBS

from tinyllm.training.memory import blank_batch, estimate_memory
from tinyllm.training.params import TrainingParams

BENCHMARK = Path(__file__).parent.parent.parent / "benchmarks/memory.py"
PARAMS = TrainingParams(**{**KNOBS, "optimizer": "adamw"})
BASE = {"vocab_size": 4096, "seq_len": 256, "batch_size": 8, "steps": 2}
"""As shipped: below about 150 MB the 20 MB that libraries set aside would count for too much."""


def test_what_lasts_is_counted_exactly():
    n_buffers = 2 * CONFIG.max_seq_len * CONFIG.d_head // 2
    n = sum(p.numel() for p in _model().parameters())
    plain = estimate_memory(CONFIG, PARAMS, 2)
    assert plain.weights == 4 * (n + n_buffers)
    assert plain.gradients == 4 * n
    assert 8 * n <= plain.optimizer <= 8 * n + 4 * 100  # a step count per tensor
    average = estimate_memory(CONFIG, TrainingParams(**{**KNOBS, "ema_decay": 0.9}), 2)
    assert average.weights == plain.weights + 4 * n


def test_activations_grow_with_the_batch_and_shrink_with_checkpoints():
    needs = {
        mode: estimate_memory(CONFIG, TrainingParams(**{**KNOBS, "checkpoint": mode}), 64)
        for mode in ("none", "selective", "blocks")
    }
    kept = [needs[mode].activations for mode in ("none", "selective", "blocks")]
    assert kept == sorted(kept, reverse=True)
    assert estimate_memory(CONFIG, PARAMS, 64).activations > 2 * (
        estimate_memory(CONFIG, PARAMS, 16).activations
    )
    assert blank_batch(2, 3, packed=True).document_ids.shape == (2, 3)


@pytest.mark.slow  # a process each
@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"d": 256}, "optimizer": "muon", "precision": "bf16"},
        {"model": {"d": 256}, "optimizer": "adamw", "precision": "fp32"},
        {"model": {"d": 256}, "checkpoint": "blocks", "precision": "bf16"},
        {"model": {"d": 256}, "checkpoint": "selective", "precision": "bf16"},
        {"model": {"d": 512, "n_layers": 3}, "vocab_size": 8192, "optimizer": "adamw"},
        {"model": {"d": 128, "n_layers": 8, "tie_embeddings": False}, "ema_decay": 0.99},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(settings):
    spec = importlib.util.spec_from_file_location("memory_benchmark", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    measured = benchmark.in_own_process({**BASE, **settings})
    assert measured["estimated_bytes"] == pytest.approx(measured["peak_bytes"], rel=0.15)


def _model():
    from tinyllm.model.transformer import Transformer

    return Transformer(CONFIG)
