import pytest
import torch
from torch.nn import functional as F

from tinyllm.model import loss as loss_module
from tinyllm.model.loss import linear_cross_entropy
from tinyllm.shards.batches import IGNORED


def case(dtype, n=70, d=24, v=150):
    """Return hidden states, a weight and targets of which every fifth is masked."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(n, d, generator=draw, dtype=torch.float64)
    weight = torch.randn(v, d, generator=draw, dtype=torch.float64)
    targets = torch.randint(0, v, (n,), generator=draw)
    targets[::5] = IGNORED
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain(x, weight, targets):
    """Return the form with all logits at once."""
    wide = torch.promote_types(torch.float32, x.dtype)
    return F.cross_entropy(F.linear(x, weight).to(wide), targets, reduction="sum")


def loss_and_gradients(function, x, weight, targets):
    loss = function(x, weight, targets)
    return [loss.detach(), *torch.autograd.grad(loss / 7, (x, weight))]


@pytest.fixture(autouse=True)
def chunks_of_16(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", 16)


def test_the_gradient_is_that_of_finite_differences():
    x, weight, targets = case(torch.float64, n=35, d=4, v=7)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets), (x, weight))


def test_it_equals_the_plain_form_in_fp64():
    ours = loss_and_gradients(linear_cross_entropy, *case(torch.float64))
    expected = loss_and_gradients(plain, *case(torch.float64))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
def test_its_error_is_at_most_twice_that_of_torch(cast):
    exact = loss_and_gradients(plain, *case(torch.float64))
    with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
        ours = loss_and_gradients(linear_cross_entropy, *case(torch.float32))
        torchs = loss_and_gradients(plain, *case(torch.float32))
    assert [tensor.dtype for tensor in ours] == [torch.float32] * 3
    for mine, theirs, truth in zip(ours, torchs, exact, strict=True):
        bound = 2 * (theirs - truth).norm() + 1e-7 * truth.norm()  # 1e-7: half a bit of fp32
        assert (mine - truth).norm() <= bound


def test_no_tensor_has_a_row_of_logits_per_position():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (150,):
                self.rows = max(self.rows, len(result))
            return result

    x, weight, targets = case(torch.float32)
    with Largest() as largest:
        linear_cross_entropy(x, weight, targets).backward()
    assert largest.rows == 24  # the transposed weight; a chunk has 16 rows
    monster = case(torch.float32, n=16 * 40)
    with Largest() as largest:
        linear_cross_entropy(*monster).backward()
    assert largest.rows == 40  # at most 16 chunks


def test_masked_rows_and_a_frozen_weight_get_no_gradient():
    x, weight, targets = case(torch.float32)
    linear_cross_entropy(x, weight.detach(), targets).backward()
    assert (x.grad[::5] == 0).all()
    assert (x.grad[1::5] != 0).any()
    assert weight.grad is None
    nothing = linear_cross_entropy(x, weight, torch.full_like(targets, IGNORED))
    assert nothing.item() == 0


@pytest.mark.slow  # a minute of compiling under load
def test_compiled_it_is_the_same():
    def cast(x, weight, targets):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(x, weight, targets)

    compiled = torch.compile(cast, fullgraph=True, dynamic=False)
    exact = loss_and_gradients(plain, *case(torch.float64))
    eager = loss_and_gradients(cast, *case(torch.float32))
    for mine, theirs, truth in zip(
        loss_and_gradients(compiled, *case(torch.float32)), eager, exact, strict=True
    ):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + 1e-7 * truth.norm()
