"""Softmax cross-entropy with its gradient, by our C++ (kernels/cpu/cross_entropy.h).

An operator of torch, which `torch.compile` takes whole. Same bits for any number of threads.
Dimensions: N positions, V vocabulary.
"""

import ctypes

import torch
from torch import Tensor

from tinyllm.ops import cpu

FORMATS = (torch.float32, torch.bfloat16)


class _CrossEntropy(ctypes.Structure):
    """`tinyllm::CrossEntropy` of kernels/cpu/cross_entropy.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "targets", "loss", "gradient")),
        *((name, ctypes.c_int64) for name in ("rows", "n", "is_bf16", "isa")),
    )


def refuses(logits: Tensor) -> str | None:
    """Return why the kernel cannot serve such logits, None if it can; builds the library."""
    if logits.dtype not in FORMATS:
        return f"it knows fp32 and bf16, not {logits.dtype}"
    if reason := cpu.refuses(logits.device):
        return reason
    return "it needs AVX2" if cpu.best_isa() == 0 else None


@torch.library.custom_op("tinyllm::cross_entropy", mutates_args=(), device_types="cpu")
def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `reference.cross_entropy` does; for logits in bf16 or fp32.

    Raises:
        RuntimeError: a target is not below V.
    """
    logits, targets = logits_NV.contiguous(), targets_N.contiguous()
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"one int64 target per row is needed, got {tuple(targets.shape)}")
    loss, gradient = torch.empty(len(logits)), torch.empty_like(logits)
    problem = _CrossEntropy(
        *(x.data_ptr() for x in (logits, targets, loss, gradient)),
        *(*logits.shape, int(logits.dtype == torch.bfloat16), cpu.best_isa()),
    )
    library, _ = cpu.load()
    cpu.check(library.tinyllm_cross_entropy(ctypes.addressof(problem), cpu.n_threads()))
    return loss, gradient


@cross_entropy.register_fake
def _cross_entropy_fake(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Tell the compiler the shapes of the results."""
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return logits.new_empty(targets.shape, dtype=torch.float32), gradient
