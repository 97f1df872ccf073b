"""Compensated rounding against the plain algorithm in fp64, and what it is for."""

import pytest
import torch
from tiny_lm import tiny_model
from torch import nn

from tinyllm.ops.reference import quantize_per_row
from tinyllm.quantization.calibration import DAMPING, input_products, round_to_inputs
from tinyllm.quantization.int8 import quantize_model
from tinyllm.quantization.measure import measure_outputs


def correlated(n, k, seed=0):
    """Inputs that a few hidden numbers decide, as those of a model are."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, k // 4, generator=generator)
    mixed = hidden @ torch.randn(k // 4, k, generator=generator)
    return mixed + 0.3 * torch.randn(n, k, generator=generator)


def by_hand(weight, products):
    """The algorithm as its paper tells it: the inverse of the rest is made anew for each input."""
    k = weight.shape[1]
    hessian = products.double()
    hessian = hessian + torch.eye(k) * DAMPING * hessian.diagonal().mean()
    order = products.diagonal().argsort(descending=True).tolist()
    left, rounded = weight.double().clone(), torch.zeros_like(weight)
    scale = quantize_per_row(weight)[1].double()
    for n_done, i in enumerate(order):
        rest = order[n_done:]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        rounded[:, i] = (left[:, i] / scale).round().clamp(-127, 127).float()
        error = (left[:, i] - rounded[:, i] * scale) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    return rounded.to(torch.int8)


@pytest.mark.parametrize("k", [1, 7, 64, 150])  # one block and less, several
def test_it_is_the_plain_algorithm(k):
    x = correlated(400, k) if k >= 4 else torch.randn(400, k)
    weight = torch.randn(20, k, generator=torch.Generator().manual_seed(1))
    rounded, scale = round_to_inputs(weight, x.T @ x)
    assert torch.equal(scale, quantize_per_row(weight)[1])
    # fp32 against fp64: a number near the middle between two steps may fall to either side
    assert (rounded != by_hand(weight, x.T @ x)).float().mean() < 0.002


def test_inputs_without_correlation_leave_the_nearest():
    weight = torch.randn(9, 70)
    rounded, scale = round_to_inputs(weight, torch.eye(70) * 3)
    nearest, expected = quantize_per_row(weight)
    assert torch.equal(rounded, nearest)
    assert torch.equal(scale, expected)


def test_outputs_on_other_text_are_nearer():
    weight, (x, other) = torch.randn(50, 128), correlated(2500, 128).split((2000, 500))

    def error(rounded, scale):
        return (other @ (rounded * scale[:, None] - weight).T).square().mean()

    compensated = error(*round_to_inputs(weight, x.T @ x))
    assert compensated < 0.4 * error(*quantize_per_row(weight))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_useless_row_stays_alone_and_unseen_inputs_are_no_matter(value):
    weight = torch.randn(4, 40)
    weight[2, 5] = value
    if value == 0.0:
        weight[2] = 0.0
    x = correlated(100, 40)
    x[:, 3] = 0.0
    rounded, scale = round_to_inputs(weight, x.T @ x)
    assert (rounded[2] == 0).all()
    others = [0, 1, 3]
    expected, _ = round_to_inputs(weight[others], x.T @ x)
    assert torch.equal(rounded[others], expected)
    assert torch.equal(scale.nan_to_num(-1.0), quantize_per_row(weight)[1].nan_to_num(-1.0))
    rounded, _ = round_to_inputs(weight[others], torch.zeros(40, 40))
    assert torch.equal(rounded, quantize_per_row(weight[others])[0])


def test_products_are_those_of_all_inputs():
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 4))
    ids = torch.randint(10, (3, 5))
    (products,) = input_products(model, {"1": model[1]}, ids).values()
    x = model[0](ids).flatten(0, 1).double()
    torch.testing.assert_close(products.double(), x.T @ x, rtol=1e-5, atol=1e-5)


def test_a_whole_model_gets_nearer():
    model = tiny_model()
    ids = torch.randint(97, (24, 40), generator=torch.Generator().manual_seed(0))
    plain = measure_outputs(model, quantize_model(model), ids[:4])
    better = measure_outputs(model, quantize_model(model, sample_BT=ids[4:]), ids[:4])
    # Half of the noise is that of the inputs, which rounding cannot help: 3 dB would be all.
    gains = [better[kind]["sqnr_db"] - plain[kind]["sqnr_db"] for kind in ("q_proj", "down_proj")]
    assert min(gains) > 0.5
