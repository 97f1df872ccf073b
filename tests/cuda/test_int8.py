import math

import numpy as np
import pytest
import torch
from checks import no_worse, runner, seeds, two_formats
from torch.nn import functional as F

from tinyllm.ops import cuda_int8, reference

pytestmark = pytest.mark.usefixtures("poisoned")

half_formats = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def rows(m, k, dtype=torch.float32, seed=0):
    """Rows of different sizes, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    return (x * torch.randn(m, 1, generator=generator).mul(2).exp()).to(dtype)


def weights(n, k):
    return reference.quantize_per_row(rows(n, k, seed=1))


def same(ours, truth):
    torch.testing.assert_close(ours, truth, rtol=0, atol=0, equal_nan=True)


@seeds
@two_formats
@pytest.mark.parametrize("shape", [(1, 8), (5, 40), (6, 264), (3, 1032), (2, 2504)])
def test_quantized_rows_equal_the_reference(shape, dtype, seed):
    x = rows(*shape, dtype)
    ours = cuda_int8.quantize_per_row(runner(seed), x)
    for one, exact in zip(ours, reference.quantize_per_row(x), strict=True):
        same(one, exact)


@pytest.mark.parametrize("width", [64, 2048])
def test_extreme_rows_equal_the_reference(width):
    """Halves, zeros, nearly zeros, NaN, infinity, each in a row of its own."""
    x = rows(10, width)
    x[0] = (torch.arange(width) % 254 - 126.5).clamp(max=127)
    x[0, 0] = 127
    for row, extreme in enumerate(
        (0.0, 1e-45, 3e-31, 1e-30, 3e38, math.inf, -math.inf, math.nan), 1
    ):
        x[row] = 0
        x[row, width - 3] = extreme
    ours = cuda_int8.quantize_per_row(runner(0), x)
    for one, exact in zip(ours, reference.quantize_per_row(x), strict=True):
        same(one, exact)


def test_padding_is_zeros():
    q, _ = cuda_int8.quantize_per_row(runner(0), rows(5, 40), stride=64)
    same(q[:, 40:], torch.zeros(5, 24, dtype=torch.int8))


@two_formats
def test_dequantized_rows(dtype):
    q, scale = weights(37, 48)
    ours = cuda_int8.dequantize_per_row(runner(0), q, scale, dtype)
    same(ours, (q.float() * scale[:, None]).to(dtype))


def test_packed_bytes_lie_where_the_header_says():
    n, k = 41, 100
    q, scale = weights(n, k)
    packed = cuda_int8.pack(q, scale)
    flat = packed.packed.flatten().numpy()
    tiles = packed.packed.shape[1]
    assert (tiles, len(flat)) == (4, 64 * 128)
    full = np.zeros((64, 128), np.int8)
    full[:n, :k] = q.numpy()
    for output in range(64):
        o = output % 32
        fragment, row = o // 4 % 2, 8 * (o // 2 % 2) + 2 * (o // 8) + o % 2
        for i in range(128):
            word = 2 * (i % 32 // 16) + row // 8
            lane = row % 8 * 4 + i % 16 // 4
            at = (output // 32 * tiles + i // 32) * 1024 + fragment * 512 + lane * 16
            assert flat[at + word * 4 + i % 4] == full[output, i]


@seeds
@half_formats
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 4), (1, 64, 256), (2, 33, 100), (8, 96, 1084), (5, 31, 2048)]
)
def test_w8a16(m, n, k, dtype, seed):
    x, (q, scale) = rows(m, k, dtype), weights(n, k)
    y = cuda_int8.linear_w8a16(runner(seed), x, cuda_int8.pack(q, scale))
    truth = x.double() @ (q.double() * scale.double()[:, None]).T
    theirs = F.linear(x, (q.float() * scale[:, None]).to(dtype))
    no_worse(y, theirs, truth, times=2)


@half_formats
def test_w8a16_knows_every_byte(dtype):
    q = torch.arange(-127, 128, dtype=torch.int8).repeat(32, 1)[:, :252].contiguous()
    x = torch.eye(252, dtype=dtype)[124:132].contiguous()
    y = cuda_int8.linear_w8a16(runner(0), x, cuda_int8.pack(q, torch.ones(32)))
    same(y, q[:, 124:132].T.to(dtype))
    for first in range(0, 252, 84):
        x = torch.eye(252, dtype=dtype)[first : first + 84 : 12].contiguous()
        y = cuda_int8.linear_w8a16(runner(0), x, cuda_int8.pack(q, torch.ones(32)))
        same(y, q[:, first : first + 84 : 12].T.to(dtype))


@seeds
@two_formats
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 8), (3, 40, 264), (130, 160, 72), (17, 129, 512), (300, 24, 64)]
)
def test_w8a8_equals_the_reference(m, n, k, dtype, seed):
    x, (q, scale) = rows(m, k, dtype), weights(n, k)
    y = cuda_int8.linear_w8a8(runner(seed), x, cuda_int8.pack(q, scale))
    same(y, reference.bind_linear_w8a8(q, scale)(x))


def test_w8a8_has_no_bank_conflicts():
    conflicts = []
    x, (q, scale) = rows(128, 256, torch.bfloat16), weights(128, 256)
    cuda_int8.linear_w8a8(
        lambda launch: conflicts.append(runner(0)(launch)), x, cuda_int8.pack(q, scale)
    )
    assert conflicts == [0, 0]


@pytest.mark.parametrize("sign", [1, -1])
def test_largest_sums_do_not_overflow(sign):
    k = 8192
    x = torch.full((2, k), 3.0)
    packed = cuda_int8.pack(torch.full((3, k), 127 * sign, dtype=torch.int8), torch.ones(3))
    y = cuda_int8.linear_w8a8(runner(0), x, packed)
    scale = np.float32(3) / np.float32(127)
    assert (y == float(np.float32(127 * 127 * k * sign) * scale)).all()


def test_zero_and_broken_rows_stay_apart():
    x, (q, scale) = rows(7, 64), weights(20, 64)
    x[2], x[4, 9] = 0, math.nan
    y = cuda_int8.linear_w8a8(runner(0), x, cuda_int8.pack(q, scale))
    assert (y[2] == 0).all()
    assert y[4].isnan().all()
    assert not y[[0, 1, 3, 5, 6]].isnan().any()


def test_impossible_arguments_are_refused():
    packed = cuda_int8.pack(*weights(8, 64))
    for x in (rows(9, 64, torch.bfloat16), rows(2, 32, torch.bfloat16), rows(2, 64)):
        with pytest.raises(ValueError, match="needed|inputs"):
            cuda_int8.linear_w8a16(runner(0), x, packed)
    with pytest.raises(ValueError, match="inputs"):
        cuda_int8.linear_w8a8(runner(0), rows(2, 32), packed)
    with pytest.raises(ValueError, match="overflow"):
        cuda_int8.pack(torch.zeros(1, 65544, dtype=torch.int8), torch.ones(1))
    assert "more than a block" in cuda_int8.refuses_quantize(torch.empty(1, 32776).half())
