"""One AdamW step with 8-bit states (kernels/cpu/adamw8bit.h), and the codes they are kept in.

Means are kept as bytes in blocks of 256 numbers with one scale each: 2.03 bytes per parameter
instead of 8. The codes are bitsandbytes' dynamic ones: Dettmers et al. 2021, arXiv:2110.02861.
"""

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyllm.ops import cpu

BLOCK = 256
DECADES = 7
"""As in kernels/cpu/adamw8bit.h."""
TINY_SCALE = 2.0**-120
"""A block whose largest magnitude is smaller counts as zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """The 8-bit states of a parameter of n numbers; a step changes them in place."""

    m: Tensor
    """Mean of gradients: n bytes, each the number of a code."""
    v: Tensor
    """Mean of squared gradients, likewise."""
    m_scale: Tensor
    """Largest magnitude of each block, fp32."""
    v_scale: Tensor
    """Likewise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """The numbers of one step; everything that can be computed beforehand is."""

    beta1: float
    beta2: float
    rate: float
    """lr / (1 - beta1^step)."""
    inverse2: float
    """1 / sqrt(1 - beta2^step)."""
    eps: float
    decay: float
    """1 - lr weight_decay."""


class _Code(ctypes.Structure):
    """`tinyllm::StateCode` of kernels/cpu/adamw8bit.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("value", "middle")),
        *((name, ctypes.c_float * DECADES) for name in ("slope", "offset")),
        ("zero", ctypes.c_int32),
    )


class _Step(ctypes.Structure):
    """`tinyllm::AdamW8bit` of kernels/cpu/adamw8bit.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("p", "g", "m", "v", "m_scale", "v_scale")),
        ("n", ctypes.c_int64),
        *((name, _Code) for name in ("signed_code", "unsigned_code")),
        *((name, ctypes.c_float) for name in ("beta1", "rest1", "beta2", "rest2")),
        *((name, ctypes.c_float) for name in ("rate", "inverse2", "eps", "decay")),
    )


@functools.cache
def dynamic_code(*, signed: bool) -> Tensor:
    """Return the 256 codes, rising, fp32: 0, 1 and seven decades with ever more numbers in each.

    Decade i (0 to 6) is 10^(i-6) times the middles of 2^i (signed, also negative) or 2^(i+1) equal
    parts of [0.1, 1].
    """
    codes = [0.0, 1.0]
    for i in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        decade = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        codes += decade + [-x for x in decade if signed]
    return torch.tensor(sorted(codes + [0.0] * (256 - len(codes))), dtype=torch.float32)


@functools.cache
def middles(*, signed: bool) -> Tensor:
    """Return the numbers half way between a code and the next, 255 in fp32."""
    code = dynamic_code(signed=signed)
    return (code[:-1] + code[1:]) / 2


@functools.cache
def _code(*, signed: bool) -> tuple[_Code, tuple[Tensor, ...]]:
    """Return a code for the library, and the memory its tables lie in."""
    code = dynamic_code(signed=signed)
    tables = (code, torch.cat((middles(signed=signed), torch.tensor([math.inf]))))
    slopes, offsets, below = [], [], 1  # below: codes from 0 on that are less than the decade's
    for i in range(DECADES):
        parts = 2 ** (i if signed else i + 1)
        slopes.append(parts / 0.9 * 10 ** (6 - i))
        offsets.append(below - parts / 0.9 * 0.1 - 0.5)
        below += parts
    lines = ((ctypes.c_float * DECADES)(*line) for line in (slopes, offsets))
    zero = int(torch.searchsorted(code, 0.0))
    return _Code(*(table.data_ptr() for table in tables), *lines, zero), tables


def refuses(p: Tensor) -> str | None:
    """Return why the kernel cannot serve a parameter, None if it can; builds the library."""
    if p.dtype != torch.float32 or not p.is_contiguous():
        return "it wants contiguous fp32"
    return cpu.refuses(p.device)


def step(p: Tensor, g: Tensor, moments: Moments, rates: Rates) -> None:
    """Do what `reference_step` does, equal in every bit."""
    g = g.contiguous()
    states = (moments.m, moments.v, moments.m_scale, moments.v_scale)
    problem = _Step(
        *(p.data_ptr(), g.data_ptr(), *(x.data_ptr() for x in states), p.numel()),
        *(_code(signed=signed)[0] for signed in (True, False)),
        *(rates.beta1, 1 - rates.beta1, rates.beta2, 1 - rates.beta2),
        *(rates.rate, rates.inverse2, rates.eps, rates.decay),
    )
    library, _ = cpu.load()
    code = library.tinyllm_adamw8bit(ctypes.addressof(problem), cpu.best_isa(), cpu.n_threads())
    cpu.check(code)


def reference_step(p: Tensor, g: Tensor, moments: Moments, rates: Rates) -> None:
    """Make one AdamW step in place: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.

    m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2,
    p = p decay - rate (m / (sqrt(v) inverse2 + eps)); each operation is rounded to fp32.

    Args:
        p: the parameter, fp32.
        g: its gradient, the same shape.
        moments: its states.
        rates: the numbers of this step.
    """
    flat = g.reshape(-1)
    m = _dequantize(moments.m, moments.m_scale, signed=True) * rates.beta1
    m = m + flat * (1 - rates.beta1)
    v = _dequantize(moments.v, moments.v_scale, signed=False) * rates.beta2
    v = v + flat * flat * (1 - rates.beta2)
    root = v.double().sqrt().float()  # torch's own fp32 root is not always the nearest number
    update = m / (root * rates.inverse2 + rates.eps)
    p.copy_((p.reshape(-1) * rates.decay - update * rates.rate).view_as(p))
    _quantize(m, moments.m, moments.m_scale, signed=True)
    _quantize(v, moments.v, moments.v_scale, signed=False)


def _dequantize(codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """Return the numbers of a state, (n,) in fp32."""
    table = dynamic_code(signed=signed).to(codes.device)
    return table[codes.view(-1).int()] * scale.repeat_interleave(BLOCK)[: codes.numel()]


def _quantize(x: Tensor, codes: Tensor, scale: Tensor, *, signed: bool) -> None:
    """Store numbers (n,) as the nearest codes of their blocks' scales; the lower one half way."""
    padded = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    largest = padded.abs().amax(dim=1)
    usable = largest >= TINY_SCALE
    scale.copy_(torch.where(usable, largest, 0.0))
    inverse = torch.where(usable, torch.ones_like(largest) / largest, 0.0)
    between = middles(signed=signed).to(x.device)
    nearest = torch.searchsorted(between, padded * inverse[:, None])
    codes.copy_(nearest.view(-1)[: x.numel()].to(torch.uint8).view_as(codes))
