import pytest
import torch
from checks import runner, seeds

from tinyllm.ops import adamw8bit, cuda_adamw8bit
from tinyllm.ops.adamw8bit import BLOCK, Moments, Rates, dynamic_code

BETAS, LR, EPS, DECAY = (0.9, 0.99), 1e-3, 1e-8, 0.1


def empty(n):
    blocks = -(-n // BLOCK)
    codes = [torch.zeros(n, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros(blocks) for _ in range(2)]
    return Moments(m=codes[0], v=codes[1], m_scale=scales[0], v_scale=scales[1])


def rates(step):
    return Rates(
        beta1=BETAS[0],
        beta2=BETAS[1],
        rate=LR / (1 - BETAS[0] ** step),
        inverse2=(1 - BETAS[1] ** step) ** -0.5,
        eps=EPS,
        decay=1 - LR * DECAY,
    )


def gradients(n, steps):
    """Numbers of very different sizes, whole blocks of zeros and of nearly nothing among them."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        g = torch.randn(n, generator=generator) * torch.randn(n, generator=generator).mul(3).exp()
        g[BLOCK : 2 * BLOCK] = 0
        g[2 * BLOCK : 3 * BLOCK] *= 1e-25
        yield g


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
    code = dynamic_code(signed=signed)
    edge = torch.cat(((code[:-1] + code[1:]) / 2, code))
    x = torch.cat([edge, *(torch.nextafter(edge, torch.tensor(s)) for s in (-2.0, 2.0))])
    x = x[(x.abs() <= 1) & (x >= (-1.0 if signed else 0.0))]
    x = torch.nn.functional.pad(x, (0, -len(x) % (BLOCK - 1))).view(-1, BLOCK - 1)
    g = torch.cat((x, torch.ones(len(x), 1)), dim=1).flatten()  # scale 1 everywhere
    g = g if signed else g.double().sqrt().float()
    zero = Rates(beta1=0.0, beta2=0.0, rate=0.0, inverse2=1.0, eps=1.0, decay=1.0)
    ours, exact = empty(g.numel()), empty(g.numel())
    cuda_adamw8bit.step(runner(0), torch.zeros_like(g), g, ours, zero)
    adamw8bit.reference_step(torch.zeros_like(g), g, exact, zero)
    assert torch.equal(ours.m, exact.m)
    assert torch.equal(ours.v, exact.v)


def test_more_blocks_than_warps(monkeypatch):
    monkeypatch.setattr(cuda_adamw8bit, "MOST_BLOCKS", 2)
    test_step_equals_the_definition_in_every_bit(40 * 256 + 3, 0)


def test_other_parameters_are_refused():
    assert cuda_adamw8bit.refuses(torch.zeros(5)) is None
    assert cuda_adamw8bit.refuses(torch.zeros(4, 4).T) is not None
    assert cuda_adamw8bit.refuses(torch.zeros(5).half()) is not None
