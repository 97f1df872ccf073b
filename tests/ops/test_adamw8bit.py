import pytest
import torch
from adamw8bit_case import BETAS, DECAY, EPS, FORGETFUL, LR, borders, empty, gradients, rates
from instruction_sets import isa_fixture

from tinyllm.ops import adamw8bit
from tinyllm.ops.adamw8bit import dynamic_code
from tinyllm.training.adamw8bit import AdamW8bit

isa = isa_fixture("scalar", "avx512vnni")


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
    code, g = dynamic_code(signed=signed), borders(signed=signed)
    moments = empty(g.numel())
    adamw8bit.step(torch.zeros_like(g), g, moments, FORGETFUL)
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
