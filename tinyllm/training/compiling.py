"""Whether to compile the model, decided from the parameters alone, and what a failure looks like.

The decision never looks at a clock: a resumed run must take the same one, because compiled and
eager arithmetic round differently.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tinyllm.training.params import TrainingParams

WORTH_FLOPS = {"cpu": 3e13, "cuda": 3e15}
"""Compiling takes 20-40 s and saves about a third: it pays beyond some minutes of eager work, done
at 150 GFLOP/s (2 CPU cores, bf16) or 15 TFLOP/s (one consumer GPU)."""

LossFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(ids, targets, document ids or None) to the summed loss."""


def should_compile(params: TrainingParams, flops_per_token: int, device: torch.device) -> bool:
    """Return whether the run compiles: as told, or when its work is worth it."""
    if params.compile == "auto":
        flops = flops_per_token * params.tokens_per_step * params.steps
        return flops >= WORTH_FLOPS[device.type]
    return params.compile == "on"


def compile_loss(loss: LossFunction) -> LossFunction:
    """Return the loss as a compiled function; the work happens at its first call.

    Shapes are static: with shapes that torch generalises after a second one was seen, the code that
    runs would depend on what ran before, and a resumed run would differ.
    """
    compiled: LossFunction = torch.compile(loss, dynamic=False)
    return compiled


def is_compile_failure(error: BaseException) -> bool:
    """Return whether the error comes from the compiler, not from the model."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, TorchDynamoException | CppCompileError | InvalidCxxCompiler):
            return True
        chain = chain.__cause__
    return False
