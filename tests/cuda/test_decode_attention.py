"""Few combinations of widths and formats: each takes seconds to compile. The gates compile all."""

import math

import pytest
import torch
from checks import no_worse, runner, seeds

from tinyllm.ops import cuda_decode, reference

pytestmark = pytest.mark.usefixtures("poisoned")


def problem(heads, kv_heads, width, lengths, dtype, capacity):
    """Queries and a cache whose unused part is NaN."""
    generator = torch.Generator().manual_seed(0)
    b = len(lengths)
    q = torch.randn(b, heads, width, generator=generator).to(dtype)
    k, v = (torch.randn(b, kv_heads, capacity, width, generator=generator) for _ in range(2))
    for i, n in enumerate(lengths):
        k[i, :, n:] = v[i, :, n:] = math.nan
    return q, k.to(dtype), v.to(dtype), torch.tensor(lengths, dtype=torch.int32)


def plain(q, k, v, lengths, window, scale):
    """The definition, sequence by sequence: the last query sees all there is."""
    out = []
    for i, n in enumerate(lengths.tolist()):
        first = max(0, n - window) if window else 0
        seen = (
            x[i : i + 1, :, first:n].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)
        )
        keys, values = seen
        weights = (q[i : i + 1, :, None] @ keys.mT * scale).softmax(-1)
        out.append((weights @ values)[:, :, 0])
    return torch.cat(out)


def check(q, k, v, lengths, seed, window=0, scales=None, bytes_kv=None):
    scale = q.shape[-1] ** -0.5
    stored = (k, v) if bytes_kv is None else bytes_kv
    y = cuda_decode.attention(
        runner(seed), q, *stored, lengths, scales=scales, window=window, scale=scale
    )
    truth = plain(q.double(), k.double(), v.double(), lengths, window, scale)
    theirs = plain(q, k.to(q.dtype), v.to(q.dtype), lengths, window, scale)
    no_worse(y, theirs, truth, times=2)


@seeds
@pytest.mark.parametrize(
    ("heads", "kv_heads", "lengths", "capacity"),
    [
        (1, 1, [1], 1),
        (4, 2, [64, 37], 70),
        (6, 2, [131], 200),
        (9, 1, [65], 100),  # more queries than a block takes
        (3, 3, [300, 1, 129], 300),
    ],
)
def test_shapes(heads, kv_heads, lengths, capacity, seed):
    check(*problem(heads, kv_heads, 64, lengths, torch.bfloat16, capacity), seed)


@pytest.mark.parametrize(("width", "dtype"), [(32, torch.bfloat16), (128, torch.float16)])
def test_widths_and_formats(width, dtype):
    check(*problem(8, 2, width, [90, 150], dtype, 160), 0)


@pytest.mark.parametrize(("batch", "capacity", "chunk"), [(64, 600, 128), (128, 300, 256)])
def test_longer_chunks(batch, capacity, chunk):
    assert cuda_decode._chunk(batch, capacity) == chunk
    check(*problem(1, 1, 32, [1] * (batch - 1) + [270], torch.bfloat16, capacity), 0)


@seeds
@pytest.mark.parametrize("window", [1, 5, 64, 100, 500])
def test_window(window, seed):
    check(*problem(4, 2, 32, [200, 63], torch.bfloat16, 200), seed, window=window)


@seeds
def test_int8_cache(seed):
    q, k, v, lengths = problem(4, 2, 64, [70, 131], torch.bfloat16, 140)
    quantized = [reference.quantize_per_row(x.nan_to_num()) for x in (k, v)]
    scales = tuple(s.clone() for _, s in quantized)
    for one in scales:
        for i, n in enumerate(lengths.tolist()):
            one[i, :, n:] = math.nan
    back = [x.double() * s.double()[..., None] for (x, s) in quantized]
    check(*(q, *back, lengths, seed), scales=scales, bytes_kv=tuple(x for x, _ in quantized))


def test_huge_scores_do_not_overflow():
    q, k, v, lengths = problem(2, 1, 64, [150], torch.bfloat16, 150)
    check(q * 100, k * 100, v, lengths, 0)


def test_widths_and_formats_it_lacks_are_refused():
    assert cuda_decode.refuses(torch.bfloat16, 64) is None
    assert "widths" in cuda_decode.refuses(torch.bfloat16, 96)
    assert "float32" in cuda_decode.refuses(torch.float32, 64)
    q, k, v, lengths = problem(2, 1, 64, [5], torch.bfloat16, 8)
    with pytest.raises(ValueError, match="int32"):
        cuda_decode.attention(runner(0), q, k, v, lengths.long(), scale=1.0)


def test_recorded_launches_serve_a_cache_that_grows(monkeypatch):
    """As a replayed graph does: the same launches, the same memory, another length in it."""
    q, k, v, lengths = problem(4, 2, 32, [200], torch.bfloat16, 200)
    make, held, launches = torch.Tensor.new_empty, [], []

    def hold(*args, **kwargs):
        held.append(make(*args, **kwargs))
        return held[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", hold)
    y = cuda_decode.attention(launches.append, q, k, v, lengths, window=150, scale=0.2)
    for n in (1, 64, 65, 200):
        lengths.fill_(n)
        for launch in launches:
            runner(0)(launch)
        arguments = lengths, 150, 0.2
        truth = plain(q.double(), k.double(), v.double(), *arguments)
        no_worse(y, plain(q, k, v, *arguments), truth, times=2)
