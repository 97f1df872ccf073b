import pytest
import torch
from checks import no_worse, runner, seeds, two_formats
from torch.nn import functional as F

from tinyllm.model.rope import apply_rope, rope_tables
from tinyllm.ops import cuda_pointwise

pytestmark = pytest.mark.usefixtures("poisoned")


def numbers(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(2).to(dtype)


def turn(x, cos, sin):
    """The definition for (tokens, heads, width), in the format of its arguments."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@seeds
@two_formats
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (7, 3, 1, 32), (5, 4, 2, 112), (9, 6, 6, 64)])
def test_rope(shape, dtype, seed):
    tokens, heads, kv_heads, width = shape
    both = numbers(tokens, heads + kv_heads, width, dtype=dtype)
    cos, sin = rope_tables(tokens, width, 10000.0)
    q, k = (x.clone() for x in both.split((heads, kv_heads), dim=1))
    ours = both.clone()
    parts = ours[:, :heads], ours[:, heads:]  # not contiguous, as after one product for q, k and v
    cuda_pointwise.rope(runner(seed), *parts, cos, sin)
    for x, turned in zip((q, k), parts, strict=True):
        truth = turn(x.double(), cos.double(), sin.double())
        no_worse(turned, apply_rope(x[None], cos, sin)[0], truth, times=2)


@seeds
def test_rope_of_several_sequences_and_back(seed):
    q, k = numbers(6, 2, 32, dtype=torch.float32), numbers(6, 1, 32, dtype=torch.float32, seed=1)
    cos, sin = (x.contiguous() for x in rope_tables(3, 32, 100.0))
    ours = q.clone(), k.clone()
    cuda_pointwise.rope(runner(seed), *ours, cos, sin)
    assert torch.allclose(ours[0], turn(q, cos.repeat(2, 1), sin.repeat(2, 1)), atol=1e-6)
    cuda_pointwise.rope(runner(seed), *ours, cos, sin, back=True)
    assert torch.allclose(ours[0], q, atol=1e-6)
    assert torch.allclose(ours[1], k, atol=1e-6)


def swiglu_gradients(gate, up, dy):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    (F.silu(gate) * up).backward(dy)
    return gate.grad, up.grad


@seeds
@two_formats
@pytest.mark.parametrize("shape", [(1, 8), (5, 40), (37, 64), (3, 1032)])
def test_swiglu(shape, dtype, seed):
    joined = numbers(shape[0], 2 * shape[1], dtype=dtype)
    gate, up = joined.chunk(2, dim=1)
    dy = numbers(*shape, dtype=dtype, seed=1)
    y = cuda_pointwise.swiglu(runner(seed), gate, up)
    truth = F.silu(gate.double()) * up.double()
    no_worse(y, F.silu(gate) * up, truth, times=2)
    ours = cuda_pointwise.swiglu_backward(runner(seed), dy, gate, up)
    exact = swiglu_gradients(gate.double(), up.double(), dy.double())
    theirs = swiglu_gradients(gate, up, dy)
    for one, other, true in zip(ours, theirs, exact, strict=True):
        no_worse(one, other, true, times=3)


def test_swiglu_of_huge_gates():
    gate = torch.tensor([[1e4, -1e4, 88.0, -88.0, 3e38, -3e38, 0.0, -104.0]])
    y = cuda_pointwise.swiglu(runner(0), gate, torch.ones_like(gate))
    assert torch.equal(y[0, [0, 1, 2, 4, 5, 6]], torch.tensor([1e4, 0, 88.0, 3e38, 0, 0]))
    assert y.abs().isfinite().all()


def test_what_is_not_whole_vectors_is_refused():
    assert cuda_pointwise.refuses(torch.bfloat16, 64) is None
    assert "whole vectors" in cuda_pointwise.refuses(torch.bfloat16, 36)
    assert "not torch.int8" in cuda_pointwise.refuses(torch.int8, 64)
    x = torch.zeros(3, 36, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="whole vectors"):
        cuda_pointwise.swiglu(runner(0), x, x)
    with pytest.raises(ValueError, match="whole vectors"):
        cuda_pointwise.rope(runner(0), x[:, None], x[:, None], *rope_tables(3, 36, 100.0))
