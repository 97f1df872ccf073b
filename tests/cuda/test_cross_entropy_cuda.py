import math

import pytest
import torch
from checks import no_worse, runner, seeds, two_formats

from tinyllm.ops import cuda_cross_entropy, reference

pytestmark = pytest.mark.usefixtures("poisoned")


def problem(rows, n, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, n, generator=generator) * 4
    targets = torch.randint(0, n, (rows,), generator=generator)
    targets[1::3] = -100
    return logits.to(dtype), targets


@seeds
@two_formats
@pytest.mark.parametrize("shape", [(1, 8), (7, 72), (3, 1024), (2, 4104)])
def test_equals_the_reference(shape, dtype, seed):
    logits, targets = problem(*shape, dtype)
    loss, gradient = cuda_cross_entropy.cross_entropy(runner(seed), logits, targets)
    true_loss, truth = reference.cross_entropy(logits.double(), targets)
    their_loss, theirs = reference.cross_entropy(logits, targets)
    no_worse(loss, their_loss, true_loss, times=2, largest=logits.double().abs().max())
    no_worse(gradient, theirs, truth, times=3, largest=1)  # before 1 is subtracted
    assert (loss[1::3] == 0).all()
    assert (gradient[1::3] == 0).all()


def test_extremes():
    logits = torch.zeros(3, 64)
    logits[0], logits[1, 5], logits[2, 5] = 3e38, 1e4, -1e4
    targets = torch.tensor([0, 6, 5])
    loss, gradient = cuda_cross_entropy.cross_entropy(runner(0), logits, targets)
    true_loss, truth = reference.cross_entropy(logits.double(), targets)
    true_loss[0], truth[0] = math.log(64), 1 / 64  # fp64 cannot see it beside 3e38
    truth[0, 0] -= 1
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-6, atol=1e-7)


def test_a_target_beyond_the_vocabulary_is_seen():
    logits, _ = problem(2, 8, torch.float32)
    loss, _ = cuda_cross_entropy.cross_entropy(runner(0), logits, torch.tensor([8, 3]))
    assert math.isnan(loss[0])
    assert loss[1].isfinite()


def test_vocabularies_it_cannot_hold_are_refused():
    assert cuda_cross_entropy.refuses(torch.empty(1, 32768).bfloat16()) is None
    assert "more than a block" in cuda_cross_entropy.refuses(torch.empty(1, 32776).bfloat16())
    assert "whole vectors" in cuda_cross_entropy.refuses(torch.empty(1, 4097))
