import math

import pytest
import torch
from instruction_sets import isa_fixture

from tinyllm.ops import reference
from tinyllm.ops.cross_entropy import cross_entropy

FORMATS = (torch.float32, torch.bfloat16)
EPS = 2.0**-23


isa = isa_fixture("avx2", "avx512vnni")


def case(rows, n, dtype, spread=4.0):
    draw = torch.Generator().manual_seed(rows * n)
    logits = (torch.randn(rows, n, generator=draw) * spread).to(dtype)
    targets = torch.randint(0, n, (rows,), generator=draw)
    targets[::3] = -100
    return logits, targets


def exact(logits, targets):
    """Torch's own loss and gradient in fp64."""
    wide = logits.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), wide)[0]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 2), (4, 15), (4, 16), (7, 17), (33, 1000), (9, 8192)]
)
def test_it_is_torchs_loss_and_gradient_but_for_rounding(isa, shape, dtype):
    logits, targets = case(*shape, dtype)
    loss, gradient = cross_entropy(logits, targets)
    true_loss, true_gradient = exact(logits, targets)
    # a lane sums n / 8 numbers; e^x is wrong by 2 eps, and by x eps as its argument is rounded
    x = float(logits.max() - logits.min())
    share = (shape[1] / 8 + x + 4) * EPS
    assert (loss - true_loss).abs().max() <= share + 2 * EPS * true_loss.abs().max()
    half_ulp = 2.0**-8 if dtype == torch.bfloat16 else EPS
    bound = true_gradient.abs() * (half_ulp + share) + share * (true_gradient < 0)
    assert ((gradient - true_gradient).abs() <= bound + 2.0**-126).all()
    assert (gradient[::3] == 0).all()
    assert (loss[::3] == 0).all()
    assert gradient.dtype == dtype


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_huge_logits_neither_overflow_nor_underflow(isa, dtype):
    logits = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38]], dtype=dtype)
    loss, gradient = cross_entropy(logits, torch.tensor([0, 2]))
    assert loss.tolist() == pytest.approx([0.0, math.log(3)], abs=2 * EPS)
    assert gradient[0].tolist() == pytest.approx([0, 0, 0], abs=2 * EPS)
    assert gradient[1].float().tolist() == pytest.approx([1 / 3, 1 / 3, -2 / 3], rel=2.0**-8)


def test_a_nan_reaches_the_loss_and_the_whole_row(isa):
    logits, targets = case(4, 40, torch.bfloat16)
    logits[1, 3] = torch.nan
    loss, gradient = cross_entropy(logits, targets)
    assert loss.isnan().tolist() == [False, True, False, False]
    assert gradient.isnan().all(dim=1).tolist() == [False, True, False, False]


def test_the_number_of_threads_changes_no_bit(isa, monkeypatch):
    logits, targets = case(50, 777, torch.bfloat16)
    monkeypatch.setenv("TINYLLM_THREADS", "1")
    alone = cross_entropy(logits, targets)
    monkeypatch.setenv("TINYLLM_THREADS", "3")
    assert all(map(torch.equal, alone, cross_entropy(logits, targets)))


def test_strides_are_followed(isa):
    logits, targets = case(6, 30, torch.float32)
    expected = cross_entropy(logits, targets)
    assert all(map(torch.equal, expected, cross_entropy(logits.T.contiguous().T, targets)))


def test_impossible_arguments_are_refused(isa):
    logits, targets = case(4, 10, torch.float32)
    with pytest.raises(RuntimeError, match="refused"):
        cross_entropy(logits, targets + 10)
    with pytest.raises(ValueError, match="one int64 target per row"):
        cross_entropy(logits, targets[:2])


@pytest.mark.parametrize("dtype", [*FORMATS, torch.float64], ids=str)
def test_the_reference_is_torchs(dtype):
    logits, targets = case(20, 60, dtype)
    loss, gradient = reference.cross_entropy(logits, targets)
    true_loss, true_gradient = exact(logits, targets)
    wide = torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss, true_loss.to(wide))
    torch.testing.assert_close(gradient, true_gradient.to(dtype))
