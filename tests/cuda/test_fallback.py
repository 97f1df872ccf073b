"""With each backend disabled in turn the next one computes, and the results stay right."""

import dataclasses

import emulator
import pytest
import torch

from tinyllm.ops import cpu, cuda_driver, reference, registry
from tinyllm.ops.attention import attention
from tinyllm.ops.block import decode_attention, rms_norm, rope, swiglu
from tinyllm.ops.linear import linear_w8a8, quantize_per_row

CHAINS = {
    "attention": ["cuda", "cpu", "torch", "reference"],
    "linear_w8a8": ["cuda", "cpu", "torch", "reference"],
    "quantize_per_row": ["cuda", "cpu", "reference"],
    "cross_entropy": ["cuda", "cpu", "reference"],
    "adamw8bit": ["cuda", "cpu", "reference"],
    "rms_norm": ["cuda", "reference"],
    "rope": ["cuda", "reference"],
    "swiglu": ["cuda", "reference"],
    "decode_attention": ["cuda", "torch", "reference"],
}


@pytest.fixture(params=[(), ("cuda",), ("cuda", "cpu"), ("cuda", "cpu", "torch")], ids=str)
def disabled(request, monkeypatch):
    """Backends that refuse everything; CUDA is emulated."""
    monkeypatch.delenv("TINYLLM_KERNELS", raising=False)
    monkeypatch.setattr(cuda_driver, "run", emulator.run)
    for name in ("refuses", "obstacle"):
        monkeypatch.setattr(cuda_driver, name, lambda *_: None)
    off = (*request.param, *(() if cpu.load()[0] else ("cpu",)))
    left = {
        name: [
            dataclasses.replace(each, refuses=lambda _: "disabled") if each.backend in off else each
            for each in implementations
        ]
        for name, implementations in registry.OPERATIONS.items()
    }
    monkeypatch.setattr(registry, "OPERATIONS", left)
    return off


def subject(operation):
    """Something that the backends of an operation have no objection to."""
    if operation == "attention":
        return registry.flash.AttentionSizes(
            device=torch.device("cpu"), dtype=torch.bfloat16, width=32, value_width=16
        )
    dtypes = {"linear_w8a8": torch.int8, "adamw8bit": torch.float32}
    return torch.zeros(3, 64, dtype=dtypes.get(operation, torch.bfloat16))


@pytest.mark.parametrize("operation", CHAINS)
def test_the_next_one_is_chosen(disabled, operation):
    expected = next(name for name in CHAINS[operation] if name not in disabled)
    assert registry.select(operation, subject(operation)).backend == expected


def test_every_operation_stays_right(disabled):
    torch.manual_seed(0)
    x, weight, angle = torch.randn(9, 48), torch.rand(48), torch.rand(9, 16)
    q, scale = quantize_per_row(x)
    assert torch.equal(q, reference.quantize_per_row(x)[0])
    assert torch.equal(linear_w8a8(x, q, scale), reference.bind_linear_w8a8(q, scale)(x))
    shapes = ((1, 4, 40, 32), (1, 2, 40, 32), (1, 2, 40, 16))
    heads = [torch.randn(shape).bfloat16() for shape in shapes]
    queries, keys = (h.transpose(1, 2)[:, :9].float() for h in heads[:2])
    one, cache = heads[0][:, :, 0], heads[1]
    for ours, definition, arguments, tolerance in (
        (rms_norm, reference.rms_norm, (x, weight, 1e-5), 1e-5),
        (swiglu, reference.swiglu, (x, x), 1e-5),
        (
            lambda *heads: attention(*heads, scale=0.2),
            lambda *heads: reference.attention(*(h.float() for h in heads), None, 0, 0.2),
            heads,
            2e-2,
        ),
        (
            lambda *a: torch.cat([y.flatten() for y in rope(*a)]),
            lambda *a: torch.cat([y.flatten() for y in reference.rope(*a)]),
            (queries, keys, angle.cos(), angle.sin()),
            1e-5,
        ),
        (
            lambda *a: decode_attention(*a, window=0, scale=0.2),
            lambda *a: reference.decode_attention(*a, 0, 0.2),
            (one, cache, cache, torch.tensor([17])),
            2e-2,
        ),
    ):
        expected = definition(*arguments).float()
        error = (ours(*arguments).float() - expected).norm()
        assert error <= tolerance * expected.norm()
