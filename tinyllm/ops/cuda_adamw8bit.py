"""One AdamW step with 8-bit states, on a card: kernels/cuda/adamw8bit.cu."""

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor

from tinyllm.ops.adamw8bit import (
    BLOCK,
    DECADES,
    Moments,
    Rates,
    dynamic_code,
    lines,
    middles,
)
from tinyllm.ops.cuda_rows import Run, check_pointers
from tinyllm.ops.launch import Launch

SOURCE = "adamw8bit.cu"
WARPS = 8
"""Of a block of threads; each takes a block of numbers at a time."""
MOST_BLOCKS = 1024
"""Of threads: each copies the tables once, and takes several blocks of numbers if need be."""
TABLE_BYTES = 4 * 256 * 4
"""Codes and middles, of both kinds."""


class _Lines(ctypes.Structure):
    """`Lines` of the source."""

    _fields_ = (
        *((name, ctypes.c_float * DECADES) for name in ("slope", "offset")),
        ("zero", ctypes.c_int32),
    )


class _Step(ctypes.Structure):
    """`AdamW8bit` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("p", "g", "m", "v", "m_scale", "v_scale")),
        *(("tables", ctypes.c_void_p), ("n", ctypes.c_int64), ("lines", _Lines * 2)),
        *((name, ctypes.c_float) for name in ("beta1", "rest1", "beta2", "rest2")),
        *((name, ctypes.c_float) for name in ("rate", "inverse2", "eps", "decay")),
    )


def refuses(p: Tensor) -> str | None:
    """Return why the kernel cannot serve a parameter, None if it can."""
    if p.dtype != torch.float32 or not p.is_contiguous():
        return "it wants contiguous fp32"
    return None


def step(run: Run, p: Tensor, g: Tensor, moments: Moments, rates: Rates) -> None:
    """Do what `adamw8bit.reference_step` does, equal in every bit."""
    g = g.contiguous()
    check_pointers(p, g, moments.m, moments.v)
    if not p.numel():
        return
    blocks = -(-p.numel() // BLOCK)
    run(
        Launch(
            source=SOURCE,
            entry="adamw8bit",
            grid=(min(MOST_BLOCKS, -(-blocks // WARPS)), 1, 1),
            block=(WARPS * 32, 1, 1),
            shared_bytes=TABLE_BYTES,
            arguments=_Step(
                *(p.data_ptr(), g.data_ptr(), moments.m.data_ptr(), moments.v.data_ptr()),
                *(moments.m_scale.data_ptr(), moments.v_scale.data_ptr()),
                *(_tables(p.device).data_ptr(), p.numel(), _both_lines()),
                *(rates.beta1, 1 - rates.beta1, rates.beta2, 1 - rates.beta2),
                *(rates.rate, rates.inverse2, rates.eps, rates.decay),
            ),
        )
    )


@functools.cache
def _tables(device: torch.device) -> Tensor:
    """Return `Tables` of the source on a device."""
    last = torch.tensor([math.inf])
    tables = torch.cat(
        [
            *(dynamic_code(signed=signed) for signed in (True, False)),
            *(torch.cat((middles(signed=signed), last)) for signed in (True, False)),
        ]
    )
    assert tables.nbytes == TABLE_BYTES
    return tables.to(device)


@functools.cache
def _both_lines() -> Any:
    """Return the lines of signed and of unsigned codes."""
    both = []
    for signed in (True, False):
        slopes, offsets, zero = lines(signed=signed)
        arrays = ((ctypes.c_float * DECADES)(*line) for line in (slopes, offsets))
        both.append(_Lines(*arrays, zero))
    return (_Lines * 2)(*both)
