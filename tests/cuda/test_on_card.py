"""The kernels at real sizes on this machine's card: errors against fp64, equal bits in two runs.

What needs no card, odd shapes above all, is tested in the emulator.
"""

import pytest
import torch

from tinyllm.ops import cuda, cuda_block_op, cuda_hopper, cuda_norm_op, reference

pytestmark = pytest.mark.gpu

CARD = torch.device("cuda")
SIZES = pytest.mark.parametrize("rows", [3, 1000], ids=["small", "large"])
FORMATS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device=CARD).to(dtype).requires_grad_()


def with_gradients(run, inputs):
    y = run(*inputs)
    d_y = torch.cos(torch.arange(y.numel(), device=CARD)).view(y.shape).to(y.dtype)
    return [x.detach() for x in (y, *torch.autograd.grad(y, inputs, d_y))]


def check(ours, definition, inputs):
    """Forward at most 2, gradients at most 3 times plain torch's error; the same bits again."""
    results = with_gradients(ours, inputs)
    exact = with_gradients(definition, [x.detach().double().requires_grad_() for x in inputs])
    plain = with_gradients(definition, inputs)
    for i, (one, truth, other) in enumerate(zip(results, exact, plain, strict=True)):
        error, allowed = ((x.double() - truth).norm() for x in (one, other))
        assert error <= (3 if i else 2) * allowed + 1e-6 * truth.norm()
    for first, second in zip(results, with_gradients(ours, inputs), strict=True):
        assert torch.equal(first, second)


@FORMATS
@pytest.mark.parametrize("widths", [(32, 32), (64, 64), (96, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("shared", [1, 4])
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("t", [33, 700], ids=["small", "large"])
def test_attention(dtype, widths, shared, window, t):
    k_width, v_width = widths
    inputs = [
        normal(2, n, t, width, dtype=dtype)
        for n, width in ((4, k_width), (4 // shared, k_width), (4 // shared, v_width))
    ]
    documents = torch.arange(t, device=CARD).div(190, rounding_mode="floor").expand(2, t)

    def ours(q, k, v):
        return cuda.attention(q, k, v, documents, window, 0.1)

    def definition(q, k, v):
        return reference.attention(q, k, v, documents, window, 0.1)

    check(ours, definition, inputs)


@FORMATS
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (128, 64)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "window and documents"])
@pytest.mark.parametrize("t", [33, 2000], ids=["small", "large"])
def test_attention_by_wgmma(dtype, widths, masked, t, monkeypatch):
    """The kernel for Hopper, then the one by mma.sync on the same problem."""
    if not cuda_hopper.is_hopper():
        pytest.skip("the card is no Hopper")
    k_width, v_width = widths
    inputs = [
        normal(2, n, t, width, dtype=dtype)
        for n, width in ((4, k_width), (2, k_width), (2, v_width))
    ]
    documents = torch.arange(t, device=CARD).div(190, rounding_mode="floor").expand(2, t)
    rest = (documents if masked else None, 150 if masked else 0, 0.1)

    def ours(q, k, v):
        return cuda.attention(q, k, v, *rest)

    def definition(q, k, v):
        return reference.attention(q, k, v, *rest)

    results = []
    for kernel in cuda_hopper.CHOICES:
        monkeypatch.setenv(cuda_hopper.VARIABLE, kernel)
        check(ours, definition, inputs)
        results.append(ours(*inputs))
    assert not torch.equal(*results), "both are the same kernel"


@FORMATS
@SIZES
@pytest.mark.parametrize("width", [64, 768, 4096])
def test_rms_norm(dtype, rows, width):
    weight = torch.rand(width, device=CARD, requires_grad=True)

    def definition(x, weight):  # in x's own format, as plain torch has it
        return torch.nn.functional.rms_norm(x, (width,), weight.to(x.dtype), 1e-5)

    def ours(x, weight):
        return cuda_norm_op.rms_norm(x, weight, 1e-5)

    check(ours, definition, [normal(rows, width, dtype=dtype), weight])


@FORMATS
@SIZES
def test_swiglu(dtype, rows):
    inputs = [normal(rows, 2048, dtype=dtype) for _ in range(2)]
    check(cuda_block_op.swiglu, reference.swiglu, inputs)


@SIZES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int8_has_the_bits_of_the_reference(rows, dtype):
    x = normal(rows, 768, dtype=dtype).detach()
    q, scale = reference.quantize_per_row(torch.randn(2048 + 6, 768, device=CARD))
    for ours, theirs in zip(cuda.quantize_per_row(x), reference.quantize_per_row(x), strict=True):
        assert torch.equal(ours, theirs)
    y, definition = (m.bind_linear_w8a8(q, scale)(x) for m in (cuda, reference))
    if rows > 8 or dtype == torch.float32:
        assert torch.equal(y, definition)
    else:
        exact = x.double() @ (q.double() * scale.double()[:, None]).T
        assert (y.double() - exact).norm() <= (definition.double() - exact).norm()


@SIZES
def test_cross_entropy(rows):
    logits = (3 * normal(rows, 8192)).detach()
    targets = torch.randint(8192, (rows,), device=CARD)
    ours = cuda.cross_entropy(logits, targets)
    exact = reference.cross_entropy(logits.double(), targets)
    plain = reference.cross_entropy(logits, targets)
    for one, truth, other in zip(ours, exact, plain, strict=True):
        allowed = (other.double() - truth).norm()
        assert (one.double() - truth).norm() <= 2 * allowed + 1e-6 * truth.norm()


@pytest.mark.parametrize("capacity", [50, 5000], ids=["small", "large"])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_one_token_over_a_cache(capacity, width):
    q = normal(3, 8, width).detach()
    k, v = (normal(3, 2, capacity, width).detach() for _ in range(2))
    lengths = torch.tensor([1, capacity // 2, capacity], device=CARD)
    ours = cuda_block_op.decode_attention(q, k, v, lengths, 0, 0.1)
    arguments = (lengths, 0, 0.1)
    exact = reference.decode_attention(q.double(), k.double(), v.double(), *arguments)
    plain = reference.decode_attention(q, k, v, *arguments)
    assert (ours.double() - exact).norm() <= 2 * (plain.double() - exact).norm()
