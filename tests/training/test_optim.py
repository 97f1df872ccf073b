from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_trainer import CONFIG, KNOBS

from tinyllm.errors import TrainingError
from tinyllm.model.init import build_model
from tinyllm.training.muon import MOMENTUM, POLYNOMIALS, Muon, orthogonalise
from tinyllm.training.optim import build_optimizers, set_lr
from tinyllm.training.params import TrainingParams

PARAMS = TrainingParams(**KNOBS)


def best_quintic(low, high):
    """Remez: coefficients of the odd quintic nearest to 1 on [low, high], and its largest error."""
    inner = np.array([low + (high - low) / 3, low + 2 * (high - low) / 3])
    for _ in range(100):
        x = np.array([low, *inner, high])
        system = np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)
        inner = np.sqrt((-3 * b + np.array([-1, 1]) * root) / (10 * c))
    return (a, b, c), error


def test_muon_polynomials_are_the_best_three():
    low, high = 0.01, 1.0
    for given in POLYNOMIALS:
        expected, error = best_quintic(low, high)
        assert given == pytest.approx(expected, rel=1e-5)
        low, high = 1 - error, 1 + error
    assert error == pytest.approx(0.27, abs=0.005)


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96)], ids=str)
def test_orthogonalise_keeps_directions_and_levels_singular_values(shape):
    torch.manual_seed(0)
    smallest = min(shape)
    U, V = (torch.linalg.qr(torch.randn(2, n, smallest))[0] for n in shape)
    values = torch.logspace(0, -1.3, smallest)
    done = orthogonalise(U * values @ V.mT).float()
    # in the singular basis the result must be diagonal, its diagonal in the promised band
    inside = U.mT @ done @ V
    diagonal = inside.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.70
    assert diagonal.max() < 1.32
    assert (inside - torch.diag_embed(diagonal)).abs().max() < 0.05  # bf16


def test_orthogonalise_scale_does_not_matter_and_zero_stays_zero():
    X = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalise(X * 1e-4), orthogonalise(X), atol=0.03, rtol=0)
    assert orthogonalise(torch.zeros(1, 8, 8)).abs().max() == 0


def test_muon_step_is_its_formula():
    torch.manual_seed(2)
    weights = [torch.nn.Parameter(torch.randn(48, 16)) for _ in range(2)]
    before = [weight.detach().clone() for weight in weights]
    momenta = [torch.zeros(48, 16) for _ in range(2)]
    optimizer = Muon(weights, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        for i, weight in enumerate(weights):
            weight.grad = torch.randn(48, 16)
            momenta[i] = MOMENTUM * momenta[i] + (1 - MOMENTUM) * weight.grad
            ahead = MOMENTUM * momenta[i] + (1 - MOMENTUM) * weight.grad
            update = orthogonalise(ahead[None])[0].float() * 3**0.5
            before[i] = before[i] * (1 - 0.1 * 0.5) - 0.1 * update
        optimizer.step()
    for weight, expected in zip(weights, before, strict=True):
        torch.testing.assert_close(weight.detach(), expected, atol=2e-3, rtol=1e-3)


def names_by_optimizer(params, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [(names[id(p)], group["weight_decay"]) for group in o.param_groups for p in group["params"]]
        for o in build_optimizers(model, params)
    ]


def test_each_parameter_goes_where_the_table_says():
    model = build_model(CONFIG, 0)
    muon, adamw = names_by_optimizer(PARAMS, model)
    assert len(muon) == 7
    assert all(name.endswith("_proj.weight") and decay == 0.1 for name, decay in muon)
    assert ("embed_tokens.weight", 0.1) in adamw
    assert all("norm" in name for name, decay in adamw if decay == 0.0)
    assert len(muon) + len(adamw) == len(list(model.parameters()))
    (everything,) = names_by_optimizer(replace(PARAMS, optimizer="adamw"), model)
    assert len(everything) == len(muon) + len(adamw)


def test_frozen_parameters_are_left_out_and_all_frozen_is_refused():
    model = build_model(CONFIG, 0).requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to train"):
        build_optimizers(model, PARAMS)
    model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    assert [len(names) for names in names_by_optimizer(PARAMS, model)] == [1]


def test_set_lr_scales_every_group_by_its_own_peak():
    optimizers = build_optimizers(build_model(CONFIG, 0), PARAMS)
    set_lr(optimizers, 0.5)
    assert {group["lr"] for o in optimizers for group in o.param_groups} == {0.01, 0.0015}


def test_eight_bit_adamw_follows_adamw_and_reloads():
    steps = {}
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(3)
        layer = torch.nn.Linear(128, 128, bias=False)
        params = replace(PARAMS, optimizer=name, lr=0.01)
        (optimizer,) = build_optimizers(layer, params)
        begin = layer.weight.detach().clone()
        for _ in range(5):
            layer.weight.grad = torch.randn(128, 128)
            optimizer.step()
        (fresh,) = build_optimizers(layer, params)
        fresh.load_state_dict(optimizer.state_dict())
        layer.weight.grad = torch.randn(128, 128)
        fresh.step()
        steps[name] = layer.weight.detach() - begin
    difference = (steps["adamw8bit"] - steps["adamw"]).norm() / steps["adamw"].norm()
    assert 0 < difference < 0.05
