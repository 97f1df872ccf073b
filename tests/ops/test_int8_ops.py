import math

import numpy as np
import pytest
import torch
from exact import rows, same
from instruction_sets import isa_fixture

from tinyllm.errors import TinyllmError
from tinyllm.ops import cpu, library, reference
from tinyllm.ops.linear import bind_linear_w8a8, linear_w8a8, quantize_per_row

SIZES = [1, 3, 4, 6, 15, 16, 17, 42, 64, 65, 123]
SHAPES = [(1, 1, 1), (1, 256, 256), (2, 6, 42), (3, 42, 6), (5, 64, 123), (6, 65, 431)]
SHAPES += [(7, 123, 704), (13, 431, 17), (97, 33, 65), (200, 16, 64)]


isa = isa_fixture(*cpu.ISAS)


def weights(n, k, seed=1):
    return reference.quantize_per_row(rows(n, k, seed))


def numpy_quantize(x):
    """The formula once more, outside torch, row by row in fp32."""
    q, scales = np.zeros(x.shape, np.int8), np.zeros(len(x), np.float32)
    for i, row in enumerate(x):
        absmax = np.abs(row).max()
        if absmax > 0:
            scales[i] = absmax / np.float32(127)
            q[i] = np.rint(row * (np.float32(127) / absmax))
    return q, scales


@pytest.mark.parametrize("k", SIZES)
def test_reference_quantizes_by_the_formula(k):
    x = rows(9, k)
    q, scale = reference.quantize_per_row(x)
    q_numpy, scale_numpy = numpy_quantize(x.numpy())
    assert np.array_equal(q.numpy(), q_numpy)
    assert np.array_equal(scale.numpy(), scale_numpy)


def test_halves_round_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    q, scale = quantize_per_row(x)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2]]
    assert scale.tolist() == [1.0]


def test_native_halves_round_to_even(isa):
    x = torch.arange(-126.5, 127).repeat(2, 1)
    x[:, 0] = 127
    assert torch.equal(cpu.quantize_per_row(x)[0], reference.quantize_per_row(x)[0])


def test_quantization_error_is_at_most_half_a_step():
    x = rows(50, 300)
    q, scale = quantize_per_row(x)
    error = (x.double() - q.double() * scale.double()[:, None]).abs()
    # Half a step, and three roundings of fp32 (2^-24 each) of at most 127 steps.
    assert (error <= scale.double()[:, None] * (0.5 + 127 * 3 * 2**-24)).all()


@pytest.mark.parametrize("k", SIZES)
def test_native_quantize_equals_reference(isa, nan_memory, k):
    x = rows(11, k)
    for a, b in zip(cpu.quantize_per_row(x), reference.quantize_per_row(x), strict=True):
        same(a, b)


@pytest.mark.parametrize("extreme", [0.0, 1e-45, 1e-30, 3e38, math.inf, -math.inf, math.nan])
def test_native_quantize_equals_reference_on_extreme_rows(isa, nan_memory, extreme):
    x = rows(3, 37)
    x[1] = 0
    x[1, 35] = extreme
    for a, b in zip(cpu.quantize_per_row(x), reference.quantize_per_row(x), strict=True):
        same(a, b)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_native_linear_equals_reference(isa, nan_memory, m, n, k):
    x, weight = rows(m, k), weights(n, k)
    same(cpu.bind_linear_w8a8(*weight)(x), reference.bind_linear_w8a8(*weight)(x))


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_int_mm_linear_equals_reference(m, n, k):
    x, weight = rows(m, k), weights(n, k)
    same(library.bind_linear_w8a8(*weight)(x), reference.bind_linear_w8a8(*weight)(x))


@pytest.mark.parametrize("sign", [1, -1])
def test_largest_sums_do_not_overflow(isa, sign):
    k = reference.MAX_K
    x = torch.full((2, k), 3.0)
    weight_q = torch.full((3, k), 127 * sign, dtype=torch.int8)
    y = cpu.bind_linear_w8a8(weight_q, torch.ones(3))(x)
    scale = np.float32(3) / np.float32(127)
    assert (y == float(np.float32(127 * 127 * k * sign) * scale)).all()


def test_alternating_extremes(isa):
    x = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0]).repeat(3, 13)
    weight_q = torch.tensor([127, -127], dtype=torch.int8).repeat(5, 33)[:, :65].contiguous()
    weight = weight_q, torch.ones(5)
    same(cpu.bind_linear_w8a8(*weight)(x), reference.bind_linear_w8a8(*weight)(x))


def test_zero_and_broken_rows_stay_apart(isa, nan_memory):
    x, weight = rows(7, 50), weights(20, 50)
    x[2], x[4, 9] = 0, math.nan
    y = cpu.bind_linear_w8a8(*weight)(x)
    assert (y[2] == 0).all()
    assert y[4].isnan().all()
    assert not y[[0, 1, 3, 5, 6]].isnan().any()


def test_other_layouts_and_dtypes(isa):
    weight = weights(24, 40)
    linear, exact = cpu.bind_linear_w8a8(*weight), reference.bind_linear_w8a8(*weight)
    x = rows(40, 6).T  # not contiguous
    same(linear(x), exact(x))
    same(linear(x.view(2, 3, 40)), exact(x.view(2, 3, 40)))
    half = x.bfloat16()
    assert linear(half).dtype == torch.bfloat16
    same(linear(half), exact(half))
    assert linear(x[:0]).shape == (0, 24)


def test_weight_that_is_a_transposed_view(isa):
    weight_q, scale = weights(24, 24)
    same(
        cpu.bind_linear_w8a8(weight_q.T, scale)(rows(3, 24)),
        reference.bind_linear_w8a8(weight_q.T.contiguous(), scale)(rows(3, 24)),
    )


@pytest.mark.parametrize("threads", ["1", "2", "3"])
def test_threads_do_not_change_a_bit(isa, monkeypatch, threads):
    monkeypatch.setenv("TINYLLM_THREADS", threads)
    x, weight = rows(210, 512), weights(100, 512)  # more work than one thread gets
    same(cpu.bind_linear_w8a8(*weight)(x), reference.bind_linear_w8a8(*weight)(x))


@pytest.mark.parametrize("k", [64, 431, 1024])
def test_error_is_within_the_bound_of_rounding(k):
    """Both factors are off by at most half a step, so |error| <= sum(|x| dw + |w| dx + dx dw)."""
    x, w = rows(5, k).double(), rows(9, k, 2).double()
    y = linear_w8a8(x.float(), *quantize_per_row(w.float())).double()
    dx = x.abs().amax(1, keepdim=True) / 254
    dw = w.abs().amax(1, keepdim=True) / 254
    bound = x.abs().sum(1, keepdim=True) @ dw.T + dx @ w.abs().sum(1, keepdim=True).T
    bound = (bound + k * dx @ dw.T) * (1 + 1e-5)  # a few fp32 roundings of 2^-24
    error = (y - x @ w.T).abs()
    assert (error <= bound).all()
    assert error.max() > 0


@pytest.mark.parametrize(
    ("weight_q", "scale", "word"),
    [
        (torch.zeros(2, 3), torch.ones(2), "int8"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.ones(3), "one per output"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.ones(2).double(), "fp32"),
        (torch.full((2, 3), -128, dtype=torch.int8), torch.ones(2), "-127"),
        (torch.zeros(1, reference.MAX_K + 1, dtype=torch.int8), torch.ones(1), "overflow"),
    ],
)
def test_unfit_weights_are_refused(weight_q, scale, word):
    with pytest.raises(ValueError, match=word):
        bind_linear_w8a8(weight_q, scale)


def test_unfit_input_is_refused(isa):
    with pytest.raises(ValueError, match="40 inputs"):
        cpu.bind_linear_w8a8(*weights(8, 41))(rows(2, 40))


def test_unknown_instruction_set_is_told(monkeypatch):
    if cpu.load()[0] is None:
        pytest.skip("no native kernels here")
    monkeypatch.setenv("TINYLLM_CPU_ISA", "neon")
    with pytest.raises(TinyllmError, match="neon"):
        cpu.bind_linear_w8a8(*weights(4, 4))


def test_hadamard_is_the_rotation_of_its_definition():
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    matrix = two
    for _ in range(4):
        matrix = torch.kron(two, matrix)
    x = torch.randn(3, 2, 75, dtype=torch.float64)
    expected = x.clone()
    for start in (0, 32):
        expected[..., start : start + 32] @= matrix / 32**0.5
    torch.testing.assert_close(reference.hadamard(x), expected)
    torch.testing.assert_close(reference.hadamard(reference.hadamard(x)), x)


@pytest.mark.parametrize("k", [1, 31, 32])
def test_hadamard_leaves_a_short_block(k):
    x = torch.randn(2, k)
    assert torch.equal(reference.hadamard(x), x) == (k < 32)
