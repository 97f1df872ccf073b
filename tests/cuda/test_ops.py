"""The operators of backend `cuda` as callers meet them, on CPU tensors: the emulator is the card."""

import emulator
import pytest
import torch

from tinyllm.ops import cuda, cuda_driver, reference, registry
from tinyllm.ops.attention import attention


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

    ours = gradients(lambda q, k, v: attention(q, k, v, document_ids=ids, window=9, scale=0.2), inputs)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    assert_close(ours, gradients(by_reference, doubles), gradients(by_reference, inputs), times=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids", [None, documents()])
def test_attention_is_a_well_formed_operator(dtype, ids):
    results = torch.library.opcheck(cuda.cuda_flash_attention, (*heads(dtype), ids, 5, 0.3))
    assert set(results.values()) == {"SUCCESS"}
