import pytest
import torch
from adamw8bit_case import FORGETFUL, borders, empty, gradients, rates
from checks import runner, seeds

from tinyllm.ops import adamw8bit, cuda_adamw8bit


@seeds
@pytest.mark.parametrize("n", [1, 127, 255, 256, 257, 1001, 19 * 256 + 130])
def test_step_equals_the_definition_in_every_bit(n, seed):
    p, q = (torch.randn(n, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    ours, exact = empty(n), empty(n)
    for step, g in enumerate(gradients(n, 4), start=1):
        cuda_adamw8bit.step(runner(seed), p, g, ours, rates(step))
        adamw8bit.reference_step(q, g, exact, rates(step))
        assert torch.equal(p, q)
        for name in ("m", "v", "m_scale", "v_scale"):
            assert torch.equal(getattr(ours, name), getattr(exact, name)), name


@pytest.mark.parametrize("signed", [True, False])
def test_every_number_gets_the_code_of_the_definition(signed):
    """All middles and codes with their neighbours, from states of zeros and beta = 0."""
    g = borders(signed=signed)
    ours, exact = empty(g.numel()), empty(g.numel())
    cuda_adamw8bit.step(runner(0), torch.zeros_like(g), g, ours, FORGETFUL)
    adamw8bit.reference_step(torch.zeros_like(g), g, exact, FORGETFUL)
    assert torch.equal(ours.m, exact.m)
    assert torch.equal(ours.v, exact.v)


def test_more_blocks_than_warps(monkeypatch):
    monkeypatch.setattr(cuda_adamw8bit, "MOST_BLOCKS", 2)
    test_step_equals_the_definition_in_every_bit(40 * 256 + 3, 0)


def test_other_parameters_are_refused():
    assert cuda_adamw8bit.refuses(torch.zeros(5)) is None
    assert cuda_adamw8bit.refuses(torch.zeros(4, 4).T) is not None
    assert cuda_adamw8bit.refuses(torch.zeros(5).half()) is not None
