"""The operators of backend `cuda` as callers meet them: CPU tensors, the emulator is the card."""

import emulator
import pytest
import torch

from tinyllm.ops import (
    cuda,
    cuda_block_op,
    cuda_driver,
    cuda_int8,
    cuda_norm_op,
    reference,
    registry,
)
from tinyllm.ops.adamw8bit import Moments, Rates, reference_step
from tinyllm.ops.attention import attention
from tinyllm.ops.block import decode_attention, rms_norm, rope, swiglu
from tinyllm.ops.linear import linear_w8a8, quantize_per_row


@pytest.fixture(autouse=True, params=["emulator", pytest.param("card", marks=pytest.mark.gpu)])
def _device(request, monkeypatch):
    """Force the backend; without a card the emulator runs what goes to its driver."""
    torch.compiler.reset()
    monkeypatch.setenv("TINYLLM_KERNELS", "cuda")
    if request.param == "emulator":
        monkeypatch.setattr(cuda_driver, "run", emulator.run)
        for name in ("refuses", "obstacle"):
            monkeypatch.setattr(cuda_driver, name, lambda *_: None)
        yield
    else:
        with torch.device("cuda"):
            yield
    torch.compiler.reset()


def heads(dtype=torch.bfloat16, b=1, t=40, h=4, g=2, k=32, e=16):
    """Queries, keys and values, as layers make them: heads beside each other."""
    torch.manual_seed(1)
    shapes = (h, k), (g, k), (g, e)
    return [torch.randn(b, t, n, w).to(dtype).transpose(1, 2).requires_grad_() for n, w in shapes]


def documents(b=1, t=40):
    return torch.arange(t).div(17, rounding_mode="floor").expand(b, t)


def gradients(run, inputs):
    y = run(*inputs)
    torch.manual_seed(2)
    return (y, *torch.autograd.grad(y, inputs, torch.randn_like(y)))


def assert_close(ours, exact, theirs, times):
    """Error against fp64 at most `times` that of plain torch in the same format."""
    for one, truth, other in zip(ours, exact, theirs, strict=True):
        error, allowed = ((x.double() - truth).norm() for x in (one, other))
        assert error <= times * allowed


def test_attention_and_its_gradient():
    inputs, ids = heads(), documents()

    def by_reference(q, k, v):
        return reference.attention(q, k, v, ids, 9, 0.2)

    ours = gradients(
        lambda q, k, v: attention(q, k, v, document_ids=ids, window=9, scale=0.2), inputs
    )
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    assert_close(ours, gradients(by_reference, doubles), gradients(by_reference, inputs), times=3)


def test_rms_norm_and_its_gradient():
    inputs = [torch.randn(2, 3, 24).bfloat16().requires_grad_(), torch.rand(24, requires_grad=True)]

    def by_reference(x, weight):
        return reference.rms_norm(x, weight, 1e-5)

    def plain(x, weight):
        return torch.nn.functional.rms_norm(x, (24,), weight.to(x.dtype), 1e-5)

    ours = gradients(lambda x, weight: rms_norm(x, weight, 1e-5), inputs)
    doubles = [x.detach().double().requires_grad_() for x in inputs]

    def in_fp64(x, weight):
        return torch.nn.functional.rms_norm(x, (24,), weight, 1e-5)

    assert_close(ours, gradients(in_fp64, doubles), gradients(plain, inputs), times=3)


@pytest.mark.parametrize(("rows", "dtype"), [(9, torch.bfloat16), (2, torch.float32)])
def test_int8_has_the_bits_of_the_reference(rows, dtype):
    x, weight = torch.randn(2, rows, 48).to(dtype), torch.randn(70, 48)
    q, scale = reference.quantize_per_row(weight)
    for ours, theirs in zip(quantize_per_row(x), reference.quantize_per_row(x), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(linear_w8a8(x, q, scale), reference.bind_linear_w8a8(q, scale)(x))


def test_few_rows_in_16_bits_keep_their_activations():
    x, weight = torch.randn(1, 3, 48).bfloat16(), torch.randn(70, 48)
    q, scale = reference.quantize_per_row(weight)
    exact = x.double() @ (q.double() * scale.double()[:, None]).T
    error = (linear_w8a8(x, q, scale).double() - exact).norm()
    plain = x @ (q.to(x.dtype) * scale.to(x.dtype)[:, None]).T
    assert error <= 2 * (plain.double() - exact).norm()


def test_rows_at_odd_addresses_are_copied():
    x = torch.randn(3 * 48 + 1)[1:].view(3, 48)
    assert torch.equal(quantize_per_row(x)[0], reference.quantize_per_row(x)[0])


def angles(t, half):
    angle = torch.rand(t, half)
    return angle.cos(), angle.sin()


def test_rope_and_its_gradient():
    q, k = (torch.randn(2, 3, n, 16, dtype=torch.bfloat16, requires_grad=True) for n in (4, 2))
    tables = angles(3, 8)

    def both(run):
        return lambda q, k: torch.cat([x.flatten() for x in run(q, k, *tables)])

    doubles = [x.detach().double().requires_grad_() for x in (q, k)]
    plain = gradients(both(reference.rope), (q, k))

    def in_fp64(q, k):  # the reference would round to fp32
        turned = [
            torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
            for a, b in (x.chunk(2, -1) for x in (q, k))
        ]
        return torch.cat([x.flatten() for x in turned])

    cos, sin = (x.double()[:, None] for x in tables)
    assert_close(gradients(both(rope), (q, k)), gradients(in_fp64, doubles), plain, times=2)
    low = [x.bfloat16() for x in tables]  # of a model that was cast as a whole
    assert torch.equal(rope(q, k, *low)[0], rope(q, k, *(x.float() for x in low))[0])
    per_row = [x.expand(2, 3, 8) for x in tables]
    assert torch.equal(rope(q, k, *per_row)[0], rope(q, k, *tables)[0])


def test_swiglu_and_its_gradient():
    inputs = [torch.randn(2, 3, 24, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    exact, plain = gradients(reference.swiglu, doubles), gradients(reference.swiglu, inputs)
    assert_close(gradients(swiglu, inputs), exact, plain, times=2)


@pytest.mark.parametrize("window", [0, 9])
def test_one_token_over_a_cache(window):
    q, k, v = (
        torch.randn(2, n, *s).bfloat16() for n, s in ((4, (32,)), (2, (50, 32)), (2, (50, 32)))
    )
    lengths = torch.tensor([7, 50])
    arguments = {"window": window, "scale": 0.2}
    exact = reference.decode_attention(q.double(), k.double(), v.double(), lengths, window, 0.2)
    plain = reference.decode_attention(q, k, v, lengths, window, 0.2)
    assert_close([decode_attention(q, k, v, lengths, **arguments)], [exact], [plain], times=2)


def test_cross_entropy_through_the_registry():
    logits, targets = torch.randn(5, 40).bfloat16(), torch.tensor([3, -100, 39, 0, 7])
    loss, gradient = registry.select("cross_entropy", logits).function(logits, targets)
    exact = reference.cross_entropy(logits.double(), targets)
    plain = reference.cross_entropy(logits, targets)
    assert_close((loss, gradient), exact, plain, times=2)


def test_adamw8bit_through_the_registry_has_the_bits_of_the_reference():
    p, g = torch.randn(300), torch.randn(300)
    rates = Rates(beta1=0.9, beta2=0.95, rate=0.1, inverse2=2.0, eps=1e-8, decay=0.99)

    def after(step):
        weight = p.clone()
        codes = torch.zeros(2, 304, dtype=torch.uint8)[:, :300]  # rows begin at multiples of 16
        scales = torch.zeros(2, 2)
        moments = Moments(m=codes[0], v=codes[1], m_scale=scales[0], v_scale=scales[1])
        for _ in range(2):
            step(weight, g, moments, rates)
        return weight, codes, scales

    ours = after(registry.select("adamw8bit", p).function)
    for one, other in zip(ours, after(reference_step), strict=True):
        assert torch.equal(one, other)


def packed_weight():
    q, scale = reference.quantize_per_row(torch.randn(40, 48))
    weight = cuda_int8.pack(q, scale)
    return weight.packed, weight.scale, 40, 48


BF16 = torch.bfloat16
OPERATORS = {
    "attention": lambda: (cuda.cuda_flash_attention, (*heads(), None, 5, 0.3)),
    "documents": lambda: (cuda.cuda_flash_attention, (*heads(), documents(), 0, 0.3)),
    "quantize": lambda: (cuda.quantize_rows, (torch.randn(3, 48),)),
    "linear": lambda: (cuda.linear_int8, (torch.randn(9, 48).to(BF16), *packed_weight())),
    "few rows": lambda: (cuda.linear_int8, (torch.randn(2, 48).to(BF16), *packed_weight())),
    "rms_norm": lambda: (
        cuda_norm_op.rms_norm_rows,
        (torch.randn(3, 24, requires_grad=True), None, torch.rand(24, requires_grad=True), 1e-5),
    ),
    "rope": lambda: (
        cuda_block_op.rope_rows,
        (torch.randn(6, 4, 16, requires_grad=True), torch.randn(6, 2, 16), *angles(3, 8), False),
    ),
    "swiglu": lambda: (
        cuda_block_op.swiglu_rows,
        tuple(torch.randn(3, 24, requires_grad=True) for _ in range(2)),
    ),
    "decode_attention": lambda: (
        cuda_block_op.decode_attention,
        (
            *(torch.randn(1, 4, 32).to(BF16), *torch.randn(2, 1, 2, 50, 32).to(BF16)),
            *(torch.tensor([9]), 0, 0.2),
        ),
    ),
    "cross_entropy": lambda: (
        cuda.cross_entropy,
        (torch.randn(3, 40).to(BF16), torch.tensor([1, 2, 39])),
    ),
    "rms_norm with residual": lambda: (
        cuda_norm_op.rms_norm_rows,
        (*(torch.randn(3, 24, requires_grad=True) for _ in range(2)), torch.rand(24), 1e-5),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_torch_knows_the_operator(name):
    operator, arguments = OPERATORS[name]()
    assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


class Alone(torch.nn.Module):
    """A model of one operator; its inputs are the tensors among the arguments."""

    def __init__(self, operator, arguments):
        super().__init__()
        self.operator = operator
        self.constants = [None if isinstance(x, torch.Tensor) else x for x in arguments]
        self.places = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)]

    def forward(self, *tensors):
        arguments = list(self.constants)
        for i, tensor in zip(self.places, tensors, strict=True):
            arguments[i] = tensor
        return self.operator(*arguments)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("way", ["compiled", "exported"])
def test_the_compiler_and_the_exporter_take_every_operator(name, way):
    operator, arguments = OPERATORS[name]()
    model = Alone(operator, arguments)
    inputs = tuple(x.detach() for x in arguments if isinstance(x, torch.Tensor))
    if way == "compiled":
        whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        whole = torch.export.export(model, inputs).module()
    results = [run(*(x.clone() for x in inputs)) for run in (whole, model)]
    ours, eager = (x if isinstance(x, tuple) else (x,) for x in results)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


class Sandwich(torch.nn.Module):
    """Every operation that a model may call."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(32))

    def forward(self, q, k, v):
        y = attention(rms_norm(q, self.weight, 1e-5), k, v)
        return rms_norm(y, self.weight[:16], 1e-5)


def test_the_compiler_takes_it_whole():
    model, inputs = Sandwich(), heads()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(gradients(whole, inputs), gradients(model, inputs), strict=True):
        assert torch.equal(ours, eager)


def test_it_can_be_exported():
    model, inputs = Sandwich().eval(), tuple(x.detach() for x in heads())
    program = torch.export.export(model, inputs)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"tinyllm.cuda_flash_attention.default", "tinyllm.cuda_rms_norm.default"} <= names
    assert torch.equal(program.module()(*inputs), model(*inputs))
