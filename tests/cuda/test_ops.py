"""The operators of backend `cuda` as callers meet them: CPU tensors, the emulator is the card."""

import emulator
import pytest
import torch

from tinyllm.ops import cuda, cuda_driver, cuda_int8, cuda_norm_op, reference
from tinyllm.ops.attention import attention
from tinyllm.ops.linear import linear_w8a8, quantize_per_row
from tinyllm.ops.norm import rms_norm


@pytest.fixture(autouse=True)
def _card(monkeypatch):
    """Let the emulator run what goes to the card's driver, and force the backend."""
    torch.compiler.reset()
    monkeypatch.setattr(cuda_driver, "run", emulator.run)
    for name in ("refuses", "obstacle"):
        monkeypatch.setattr(cuda_driver, name, lambda *_: None)
    monkeypatch.setenv("TINYLLM_KERNELS", "cuda")
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
    "rms_norm with residual": lambda: (
        cuda_norm_op.rms_norm_rows,
        (*(torch.randn(3, 24, requires_grad=True) for _ in range(2)), torch.rand(24), 1e-5),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_torch_knows_the_operator(name):
    operator, arguments = OPERATORS[name]()
    assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


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
