from dataclasses import replace

import pytest
import torch
from test_step import PARAMS, masked_batch, rows_of, stepper
from tiny_trainer import run_tiny

from tinyllm.training.diagnosis import noise_and_signal, part_names, rows


def test_the_noise_scale_of_known_noise_is_found():
    """Gradients g + e / sqrt(B), |g|^2 = 4, E |e|^2 = 300: the noise scale is 75."""
    draw = torch.Generator().manual_seed(1)
    g = torch.zeros(300)
    g[0] = 2.0
    estimates = []
    for _ in range(4000):
        noise = torch.randn(8, 300, generator=draw)
        micro = g + noise / 2  # each the mean over 4 targets
        small, big = micro[0].norm(), micro.mean(0).norm()
        estimates.append(noise_and_signal(small, 4, big, 32))
    noise, signal = torch.stack(estimates).mean(0).tolist()
    assert noise == pytest.approx(300, rel=0.05)
    assert signal == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_measures_the_mean_gradients_of_the_first_piece_and_of_all(precision):
    batch = masked_batch(3)
    pieces = [rows_of(batch, [i]) for i in range(3)]
    watched = stepper(replace(PARAMS, diagnostics=True, precision=precision))
    watched.scaler.load_state_dict({**watched.scaler.state_dict(), "scale": 64.0})
    _, norm = watched.run(3, pieces)
    alone = stepper(PARAMS)
    alone._backward(pieces[:1])
    n_first, n_all = 16, 16 + 11 + 6
    expected = noise_and_signal(alone._norm(), n_first, norm, n_all)
    rel = 1e-4 if precision == "fp32" else 0.05
    assert watched.diagnosis[:2].tolist() == pytest.approx(expected.tolist(), rel=rel)
    parts = watched.diagnosis[2:]
    assert part_names(watched.model) == ["embed_tokens", "layers.0", "norm"]
    assert float(parts.norm()) == pytest.approx(float(norm), rel=1e-5)


def test_rows_are_means_of_the_watched_steps():
    nan = float("nan")
    figures = torch.tensor([[nan, nan, nan], [8.0, 2.0, 1.0], [4.0, 1.0, 3.0], [nan, nan, 5.0]])
    assert rows(figures, ["all"], 2) == [
        {"step": 2, "noise_scale": 4.0, "all": 1.0},
        {"step": 4, "noise_scale": 4.0, "all": 4.0},
    ]
    assert rows(figures[:1], ["all"], 2) == []


def test_they_change_no_bit_of_the_run(tmp_path, monkeypatch):
    models, results = [], []
    for diagnostics in (False, True):
        monkeypatch.setenv("TINYLLM_INFLIGHT", str(tmp_path / str(diagnostics)))
        model, result, _ = run_tiny({"diagnostics": diagnostics})
        models.append(model)
        results.append(result)
    assert all(map(torch.equal, *(model.parameters() for model in models)))
    assert results[0].gradients == []
    assert [row["step"] for row in results[1].gradients] == [4, 8, 12, 16, 20, 24]
