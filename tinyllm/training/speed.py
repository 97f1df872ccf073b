"""How fast a run was and how near to what the machine can do.

Model FLOPs utilisation (MFU): Chowdhery et al. 2022, arXiv:2204.02311, appendix B. Recomputed
activations do not count: they are the price of a setting, not work the model needs.
"""

import resource
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from torch import nn

from tinyllm.model.transformer import Transformer

PEAK_SIZE = {"cpu": 1024, "cuda": 8192}
"""Side of the square matrices whose product is timed."""
PEAK_TRIES = 8
PEAK_BUDGET_S = 0.5
"""No further try beyond this: fp16 on a CPU without fp16 units takes seconds for one."""


def flops_per_token(model: Transformer, seq_len: int) -> int:
    """Return the floating-point operations of one training token, forward and backward.

    6 N + 12 L H Q T (appendix B of the paper): N weights of matrix products, L layers, H heads of
    width Q, T tokens per sequence. A frozen matrix needs no gradient of its own: 4 N instead of 6.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    products = sum(
        linear.weight.numel() * (6 if linear.weight.requires_grad else 4) for linear in linears
    )
    config = model.config
    return products + 12 * config.n_layers * config.n_heads * config.d_head * seq_len


def peak_flops_per_s(dtype: torch.dtype, device: torch.device) -> float:
    """Return the rate of a large square matrix product here and now, the best of a few tries."""
    n = PEAK_SIZE[device.type]
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    best_s, begin_s = float("inf"), time.perf_counter()
    for _ in range(PEAK_TRIES):
        synchronise(device)
        started_s = time.perf_counter()
        a @ b
        synchronise(device)
        now = time.perf_counter()
        best_s = min(best_s, now - started_s)
        if now - begin_s > PEAK_BUDGET_S:
            break
    return 2 * n**3 / best_s


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: of the CUDA device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def median_step_s(step_seconds: Sequence[float]) -> float:
    """Return the median over the steps after the first tenth, which pays for compiling."""
    return statistics.median(step_seconds[len(step_seconds) // 10 :])


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
