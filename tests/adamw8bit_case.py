"""States, rates and gradients that every implementation of 8-bit AdamW is tried with."""

import torch

from tinyllm.ops.adamw8bit import BLOCK, Moments, Rates, dynamic_code

BETAS, LR, EPS, DECAY = (0.9, 0.99), 1e-3, 1e-8, 0.1
FORGETFUL = Rates(beta1=0.0, beta2=0.0, rate=0.0, inverse2=1.0, eps=1.0, decay=1.0)
"""A step after which the states hold the gradient and its square."""


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


def gradients(n, steps, seed=0):
    """Numbers of very different sizes, whole blocks of zeros and of nearly nothing among them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        g = torch.randn(n, generator=generator) * torch.randn(n, generator=generator).mul(3).exp()
        g[BLOCK : 2 * BLOCK] = 0
        g[2 * BLOCK : 3 * BLOCK] *= 1e-25
        yield g


def borders(*, signed):
    """Gradients whose states are all codes and middles with their neighbours, at scale 1."""
    code = dynamic_code(signed=signed)
    edge = torch.cat(((code[:-1] + code[1:]) / 2, code))
    x = torch.cat([edge, *(torch.nextafter(edge, torch.tensor(s)) for s in (-2.0, 2.0))])
    x = x[(x.abs() <= 1) & (x >= (-1.0 if signed else 0.0))]
    blocks = torch.nn.functional.pad(x, (0, -len(x) % (BLOCK - 1))).view(-1, BLOCK - 1)
    g = torch.cat((blocks, torch.ones(len(blocks), 1)), dim=1).flatten()
    return g if signed else g.double().sqrt().float()
