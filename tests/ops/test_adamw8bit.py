import pytest
import torch
from instruction_sets import isa_fixture

from tinyllm.ops import adamw8bit
from tinyllm.ops.adamw8bit import BLOCK, Moments, Rates, dynamic_code
from tinyllm.training.adamw8bit import AdamW8bit

BETAS, LR, EPS, DECAY = (0.9, 0.99), 1e-3, 1e-8, 0.1


isa = isa_fixture("scalar", "avx512vnni")


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


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_code(signed=signed), functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000, 70 * 256 + 37])
def test_native_step_equals_the_definition_in_every_bit(isa, n):
    p, q = (torch.randn(n, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    ours, exact = empty(n), empty(n)
    for step, g in enumerate(gradients(n, 6), start=1):
        adamw8bit.step(p, g, ours, rates(step))
        adamw8bit.reference_step(q, g, exact, rates(step))
        assert torch.equal(p, q)
        for name in ("m", "v", "m_scale", "v_scale"):
            assert torch.equal(getattr(ours, name), getattr(exact, name)), name


@pytest.mark.parametrize("signed", [True, False])
def test_every_number_gets_its_nearest_code(isa, signed):
    """All middles and codes with their neighbours, found by the native step from beta = 0."""
    code = dynamic_code(signed=signed)
    between = (code[:-1] + code[1:]) / 2
    edge = torch.cat((between, code))
    x = torch.cat([edge, *(torch.nextafter(edge, torch.tensor(s)) for s in (-2.0, 2.0))])
    x = x[(x.abs() <= 1) & (x >= (-1.0 if signed else 0.0))]
    blocks = torch.nn.functional.pad(x, (0, -len(x) % (BLOCK - 1))).view(-1, BLOCK - 1)
    g = torch.cat((blocks, torch.ones(len(blocks), 1)), dim=1).flatten()  # scale 1 everywhere
    moments = empty(g.numel())
    if not signed:
        g = g.double().sqrt().float()
    zero = Rates(beta1=0.0, beta2=0.0, rate=0.0, inverse2=1.0, eps=1.0, decay=1.0)
    adamw8bit.step(torch.zeros_like(g), g, moments, zero)
    stored, kept = (moments.m, g) if signed else (moments.v, g * g)
    distance = (kept.double() - code.double()[stored.int()]).abs()
    nearest = (kept.double()[:, None] - code.double()).abs().min(dim=1).values
    # A middle is rounded to fp32 (2^-25 below 1): one distance grows, the other shrinks.
    assert (distance <= nearest + 2**-24).all()


@pytest.mark.parametrize("threads", ["1", "2", "3"])
def test_threads_do_not_change_a_bit(isa, monkeypatch, threads):
    n = 256 * 200
    results = []
    for count in ("1", threads):
        monkeypatch.setenv("TINYLLM_THREADS", count)
        p, moments = torch.zeros(n), empty(n)
        for step, g in enumerate(gradients(n, 2), start=1):
            adamw8bit.step(p, g, moments, rates(step))
        results.append((p, moments.m, moments.v))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def walk(build, dtype=torch.float32):
    torch.manual_seed(5)
    begin = torch.randn(128, 160)
    p = torch.nn.Parameter(begin.to(dtype, copy=True))
    optimizer = build([{"params": [p], "weight_decay": DECAY}])
    mean = torch.randn(128, 160)
    for _ in range(20):
        p.grad = (mean * 1e-3 + torch.randn(128, 160) * 2e-3).to(dtype)
        optimizer.step()
    return p.detach().double() - begin.double()


def test_update_error_is_that_of_bitsandbytes():
    """At most 1.05 of its distance from AdamW in fp64."""
    theirs = pytest.importorskip("bitsandbytes.optim.adamw").AdamW8bit
    options = {"lr": LR, "betas": BETAS, "eps": EPS}
    exact = walk(lambda p: torch.optim.AdamW(p, **options), torch.float64)
    ours = (walk(lambda p: AdamW8bit(p, **options)) - exact).norm()
    bound = (walk(lambda p: theirs(p, **options)) - exact).norm()
    assert 0 < ours <= 1.05 * bound
    assert bound < 0.05 * exact.norm()


def test_small_parameters_keep_fp32_states_and_equal_adamw():
    results = []
    for build in (torch.optim.AdamW, AdamW8bit):
        p = torch.nn.Parameter(torch.ones(300))
        optimizer = build([{"params": [p], "weight_decay": DECAY}], lr=LR, betas=BETAS, eps=EPS)
        for g in gradients(300, 5):
            p.grad = g.clone()
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_without_native_kernels_the_definition_steps(monkeypatch):
    monkeypatch.setenv("TINYLLM_KERNELS", "reference")
    plain = walk(lambda p: AdamW8bit(p, lr=LR, betas=BETAS, eps=EPS))
    monkeypatch.delenv("TINYLLM_KERNELS")
    assert torch.equal(plain, walk(lambda p: AdamW8bit(p, lr=LR, betas=BETAS, eps=EPS)))
