import math

import numpy as np
import pytest
import torch
from exact import rows, same
from instruction_sets import isa_fixture

from tinyllm.ops import cpu, int4, reference
from tinyllm.ops.linear import bind_linear_w4a8

SHAPES = [(1, 1, 2), (1, 256, 256), (2, 6, 42), (3, 42, 6), (4, 33, 96), (5, 64, 124), (6, 65, 430)]
SHAPES += [(7, 123, 704), (13, 431, 18), (97, 32, 66), (200, 16, 64)]

isa = isa_fixture(*cpu.ISAS)


def weights(n, k, seed=1):
    return int4.quantize_groups(rows(n, k, seed))


def group_of(*numbers):
    """The stored numbers and the scale of one group that starts with these."""
    packed, scale = int4.quantize_groups(torch.tensor([[*numbers, *[0.0] * (32 - len(numbers))]]))
    return int4.unpack(packed)[0, : len(numbers)].tolist(), scale.item()


def test_the_largest_number_of_a_group_becomes_minus_eight():
    assert group_of(4.0, -1.0, 0.75, 0.25, -3.9) == ([-8, 2, -2, 0, 7], -0.5)  # halves to even
    assert group_of(-4.0, 1.0, 3.9) == ([-8, 2, 7], 0.5)
    assert group_of(0.0, 0.0) == ([0, 0], 0.0)


def test_a_byte_has_two_inputs_and_the_end_of_a_row_is_a_shorter_group():
    assert int4.pack(torch.tensor([[-8, 7, 0, 1]], dtype=torch.int8)).tolist() == [[0xF0, 0x98]]
    packed, scale = weights(3, 42)
    assert packed.shape == (3, 21)
    assert scale.shape == (3, 2)
    assert torch.equal(int4.pack(int4.unpack(packed)), packed)
    with pytest.raises(ValueError, match="even number of inputs, got 7"):
        int4.quantize_groups(torch.zeros(2, 7))


@pytest.mark.parametrize("k", [6, 64, 430])
def test_the_error_is_within_a_step(k):
    """Half a step, a whole one where 8 is cut to 7, and bf16's rounding of the scale: 8 x 2^-9."""
    w = rows(20, k)
    packed, scale = int4.quantize_groups(w)
    error = (w.double() - int4.dequantize_groups(packed, scale).double()).abs()
    step = scale.double().abs().repeat_interleave(32, dim=1)[:, :k]
    assert (error <= step * (1 + 8 * 2**-8)).all()
    cut = int4.unpack(packed) == int4.HIGHEST
    assert (error[~cut] <= (step * (0.5 + 8 * 2**-8))[~cut]).all()


def test_as_exact_as_the_blocks_of_llama_cpp():
    gguf = pytest.importorskip("gguf")
    w = rows(64, 256)
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    theirs = gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), q4_0), q4_0)
    ours = int4.dequantize_groups(*int4.quantize_groups(w)).numpy()
    exact = w.numpy().astype(np.float64)
    norm = np.abs(exact).max(axis=1, keepdims=True)
    errors = [np.square((x - exact) / norm).mean() for x in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)  # bf16 scales instead of fp16


def test_reference_equals_exact_arithmetic_on_dequantised_weights():
    x, (packed, scale) = rows(9, 430), weights(65, 430)
    q, x_scale = reference.quantize_per_row(x)
    exact = q.double() @ int4.dequantize_groups(packed, scale).double().T
    exact *= x_scale.double()[:, None]
    # One rounding of 2^-24 per group and one for the row's scale, each of at most the sum of sizes.
    sizes = q.double().abs() @ int4.dequantize_groups(packed, scale).double().abs().T
    bound = sizes * x_scale.double()[:, None] * (14 + 2) * 2**-24
    assert ((reference.bind_linear_w4a8(packed, scale)(x) - exact).abs() <= bound).all()


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_native_linear_equals_reference(isa, nan_memory, m, n, k):
    x, weight = rows(m, k), weights(n, k)
    same(cpu.bind_linear_w4a8(*weight)(x), reference.bind_linear_w4a8(*weight)(x))


@pytest.mark.parametrize("number", [int4.LOWEST, int4.HIGHEST])
@pytest.mark.parametrize("sign", [1, -1])
def test_largest_sums_do_not_overflow(isa, number, sign):
    k = reference.MAX_K
    packed = int4.pack(torch.full((3, k), number, dtype=torch.int8))
    y = cpu.bind_linear_w4a8(packed, torch.ones(3, k // 32).bfloat16())(
        torch.full((2, k), 3.0 * sign)
    )
    scale = np.float32(3) / np.float32(127)
    assert (y == float(np.float32(127 * sign * number * k) * scale)).all()


def test_alternating_extremes(isa):
    x = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0]).repeat(7, 14)
    packed = int4.pack(torch.tensor([7, -8, -8, 7, 0], dtype=torch.int8).repeat(5, 14))
    weight = packed, torch.tensor([[1.0, -2.0, 0.5]]).repeat(5, 1).bfloat16()
    same(cpu.bind_linear_w4a8(*weight)(x), reference.bind_linear_w4a8(*weight)(x))


def test_zero_and_broken_rows_and_groups_stay_apart(isa):
    x, w = rows(7, 50), rows(20, 50, 1)
    x[2], x[4, 9] = 0, math.nan
    w[3, 40], w[5, 1], w[6] = math.nan, math.inf, 0
    weight = int4.quantize_groups(w)
    y = cpu.bind_linear_w4a8(*weight)(x)
    same(y, reference.bind_linear_w4a8(*weight)(x))
    assert y[4].isnan().all()
    assert y[:, [3, 5]].isnan().all()
    whole = y[[0, 1, 3, 5, 6]][:, [0, 1, 2, 4, *range(7, 20)]]
    assert whole.isfinite().all()
    assert (y[0, 6], y[2, 0]) == (0, 0)


def test_other_layouts_and_dtypes(isa):
    weight = weights(24, 40)
    linear, exact = cpu.bind_linear_w4a8(*weight), reference.bind_linear_w4a8(*weight)
    x = rows(40, 6).T  # not contiguous
    same(linear(x.view(2, 3, 40)), exact(x.view(2, 3, 40)))
    assert linear(x.bfloat16()).dtype == torch.bfloat16
    same(linear(x.bfloat16()), exact(x.bfloat16()))
    assert linear(x[:0]).shape == exact(x[:0]).shape == (0, 24)
    with pytest.raises(ValueError, match="42 inputs"):
        linear(rows(2, 42))


def test_threads_do_not_change_a_bit(isa, monkeypatch):
    monkeypatch.setenv("TINYLLM_THREADS", "3")
    x, weight = rows(210, 512), weights(100, 512)  # more work than one thread gets
    same(cpu.bind_linear_w4a8(*weight)(x), reference.bind_linear_w4a8(*weight)(x))


def test_packed_bytes_lie_where_the_layout_says():
    if cpu.load()[0] is None:
        pytest.skip(f"no native kernels here: {cpu.load()[1]}")
    n, k = 100, 42
    q, scale = weights(n, k)
    packed = torch.zeros(cpu.packed_bytes(n, k, 4), dtype=torch.int8)
    cpu.check(
        cpu.load()[0].tinyllm_pack_w4(q.data_ptr(), scale.data_ptr(), n, k, packed.data_ptr())
    )
    memory, bits = packed.view(torch.uint8).tolist(), scale.view(torch.uint16).tolist()
    steps, lines = 11, 11 + 2  # of K / 4, with a line of scales before every eight
    assert len(memory) == 4 * lines * 64
    for row in range(n):
        panel, pairs = row // 64, 2 if row < 64 else min(2, -(-(n - 64) // 32))
        pair, high, lane = row % 64 // 32, row % 32 // 16, row % 16
        base = panel * 2 * lines * 64 + pair * 64 + lane * 4
        for g in range(2):
            at = base + 9 * g * pairs * 64 + 2 * high
            assert memory[at] | memory[at + 1] << 8 == bits[row][g]
        for i in range(k):
            step = i // 4
            at = base + (step + step // 8 + 1) * pairs * 64 + i % 4
            assert memory[at] >> 4 * high & 15 == int4.unpack(q)[row, i] + 8, (row, i)
        assert steps == -(-k // 4)


@pytest.mark.parametrize(
    ("weight_q", "scale", "word"),
    [
        (torch.zeros(2, 3), torch.ones(2, 1).bfloat16(), "uint8"),
        (torch.zeros(2, 3, dtype=torch.uint8), torch.ones(2, 1), "bf16"),
        (torch.zeros(2, 17, dtype=torch.uint8), torch.ones(2, 1).bfloat16(), "2 outputs of 34"),
        (torch.zeros(1, 32769, dtype=torch.uint8), torch.ones(1, 2049).bfloat16(), "at most 65536"),
    ],
)
def test_unfit_weights_are_refused(weight_q, scale, word):
    with pytest.raises(ValueError, match=word):
        bind_linear_w4a8(weight_q, scale)
