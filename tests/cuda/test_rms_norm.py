import pytest
import torch
from checks import formats, no_worse, runner, seeds
from torch.nn import functional as F

from tinyllm.ops import cuda_norm

pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 1e-5
SHAPES = [(1, 8), (5, 24), (6, 264), (3, 1024), (2, 1032), (3, 2504)]
"""One vector; odd; a whole warp; every vector of it; two warps, with 1 and with many vectors."""


def inputs(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    numbers = (torch.randn(shape, generator=generator) * 3 for _ in range(4))
    return *(each.to(dtype) for each in numbers), torch.randn(shape[1], generator=generator)


def gradients(x, weight, dy, dsum):
    """Those of torch, in the format of its arguments."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = F.rms_norm(x, weight.shape, weight, EPS)
    torch.autograd.backward((y, x), (dy, dsum))
    return x.grad, weight.grad


@seeds
@formats
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape, dtype, seed):
    x, residual, _, _, weight = inputs(shape, dtype)
    y, total, inverse = cuda_norm.forward(runner(seed), x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    truth = F.rms_norm(total.double(), weight.shape, weight.double(), EPS)
    no_worse(y, F.rms_norm(total, weight.shape, weight.to(dtype), EPS), truth, times=2)
    mean = total.double().square().mean(1)
    torch.testing.assert_close(inverse.double(), (mean + EPS).rsqrt(), rtol=1e-6, atol=0)


@seeds
@formats
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, dtype, seed):
    _, total, dy, dsum, weight = inputs(shape, dtype)
    inverse = (total.double().square().mean(1) + EPS).rsqrt().float()
    ours = cuda_norm.backward(runner(seed), dy, total, inverse, weight, dsum)
    truth = gradients(*(each.double() for each in (total, weight, dy, dsum)))
    theirs = gradients(total, weight.to(dtype), dy, dsum)
    for one, other, exact in zip(ours, theirs, truth, strict=True):
        no_worse(one, other, exact, times=3)


@seeds
def test_small_numbers(seed):
    """Beside whose squares eps counts."""
    x, residual, _, _, weight = inputs((3, 64), torch.bfloat16)
    _, total, inverse = cuda_norm.forward(runner(seed), x / 1024, residual / 1024, weight, EPS)
    mean = total.double().square().mean(1)
    torch.testing.assert_close(inverse.double(), (mean + EPS).rsqrt(), rtol=1e-6, atol=0)


def test_without_a_residual_the_input_is_the_sum():
    x, residual, dy, _, weight = inputs((3, 64), torch.bfloat16)
    y, total, inverse = cuda_norm.forward(runner(0), x, None, weight, EPS)
    assert total is x
    same, _, _ = cuda_norm.forward(runner(0), x, torch.zeros_like(residual), weight, EPS)
    assert torch.equal(y, same)
    plain, dweight = cuda_norm.backward(runner(0), dy, x, inverse, weight, None)
    zero = torch.zeros_like(x)
    other, same = cuda_norm.backward(runner(1), dy, x, inverse, weight, zero)
    assert torch.equal(plain, other)
    assert torch.equal(dweight, same)


@seeds
@pytest.mark.parametrize(("shape", "warps"), [((23, 8), 12), ((7, 2504), 3)])
def test_more_rows_than_teams(shape, warps, seed, monkeypatch):
    monkeypatch.setattr(cuda_norm, "WARPS", warps)
    _, total, dy, dsum, weight = inputs(shape, torch.bfloat16)
    inverse = (total.double().square().mean(1) + EPS).rsqrt().float()
    ours = cuda_norm.backward(runner(seed), dy, total, inverse, weight, dsum)
    truth = gradients(*(each.double() for each in (total, weight, dy, dsum)))
    theirs = gradients(total, weight.bfloat16(), dy, dsum)
    for one, other, exact in zip(ours, theirs, truth, strict=True):
        no_worse(one, other, exact, times=3)


def test_fp16_does_not_overflow():
    """A single square beyond 65504 does, unless the sum is fp32."""
    x = torch.full((2, 64), 60000.0, dtype=torch.float16)
    y, _, _ = cuda_norm.forward(runner(0), x, None, torch.ones(64), EPS)
    assert torch.equal(y, torch.ones_like(y))


def test_rows_it_cannot_hold_are_refused():
    assert cuda_norm.refuses(torch.empty(2, 768, dtype=torch.bfloat16)) is None
    assert "whole vectors" in cuda_norm.refuses(torch.empty(2, 36, dtype=torch.bfloat16))
    assert "more than a block" in cuda_norm.refuses(torch.empty(2, 8200, dtype=torch.bfloat16))
    assert "not torch.int32" in cuda_norm.refuses(torch.empty(2, 64, dtype=torch.int32))
    with pytest.raises(ValueError, match="contiguous"):
        x = torch.zeros(64, 64).T
        cuda_norm.forward(runner(0), x, None, torch.ones(64), EPS)
