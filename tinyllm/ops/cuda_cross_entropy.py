"""Softmax cross-entropy with its gradient, on a card: kernels/cuda/cross_entropy.cu.

Dimensions: N positions, V vocabulary.
"""

import ctypes

import torch
from torch import Tensor

from tinyllm.ops.cuda_rows import Run, check_pointers, format_define, refuses_rows, team
from tinyllm.ops.launch import Launch

SOURCE = "cross_entropy.cu"
MAX_THREADS = 1024
"""Of a row."""


class _CrossEntropy(ctypes.Structure):
    """`CrossEntropy` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "targets", "loss", "gradient")),
        *(("rows", ctypes.c_int64), ("n", ctypes.c_int32)),
    )


def refuses(logits: Tensor) -> str | None:
    """Return why the kernel cannot serve such logits, (N, V), None if it can."""
    return refuses_rows(logits, MAX_THREADS)


def cross_entropy(run: Run, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `reference.cross_entropy` does; a target of V or more makes its loss NaN.

    Args:
        run: executes launches.
        logits_NV: contiguous, bf16, fp16 or fp32.
        targets_N: contiguous int64; a row with a negative one does not count.

    Returns:
        Losses (N,) in fp32, the gradient (N, V) in the format of the logits.
    """
    check_pointers(logits_NV)
    if targets_N.dtype != torch.int64 or targets_N.shape != logits_NV.shape[:1]:
        raise ValueError(f"one int64 target per row is needed, got {tuple(targets_N.shape)}")
    rows, n = logits_NV.shape
    loss = logits_NV.new_empty(rows, dtype=torch.float32)
    gradient = torch.empty_like(logits_NV)
    threads, rows_per_block, _ = block = team(n * logits_NV.element_size())
    if rows:
        run(
            Launch(
                source=SOURCE,
                entry="cross_entropy",
                grid=(-(-rows // rows_per_block), 1, 1),
                block=block,
                shared_bytes=threads // 8,
                arguments=_CrossEntropy(
                    *(logits_NV.data_ptr(), targets_N.contiguous().data_ptr()),
                    *(loss.data_ptr(), gradient.data_ptr(), rows, n),
                ),
                defines=format_define(logits_NV.dtype),
            )
        )
    return loss, gradient
