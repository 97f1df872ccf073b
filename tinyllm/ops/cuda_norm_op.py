"""RMSNorm by CUDA C++ (kernels/cuda/rms_norm.cu) as a torch operator with a gradient.

Dimensions: M rows, D width.
"""

from typing import Any

import torch
from torch import Tensor

from tinyllm.ops import cuda, cuda_driver, cuda_norm
from tinyllm.ops.cuda_rows import format_define


def refuses(x: Tensor) -> str | None:
    """Return why the kernel cannot serve x, (..., D), None if it can; compiles it."""
    if reason := cuda_norm.refuses(x) or cuda_driver.obstacle(x.device):
        return reason
    return cuda_driver.refuses(x.device, cuda_norm.SOURCE, format_define(x.dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Do what `reference.rms_norm` does."""
    y: Tensor = rms_norm_rows(x.reshape(-1, x.shape[-1]), None, weight.float(), eps)[0]
    return y.view(x.shape)


@torch.library.custom_op("tinyllm::cuda_rms_norm", mutates_args=())
def rms_norm_rows(
    x_MD: Tensor, residual_MD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, s = x + residual and r as `cuda_norm.forward`; without a residual, s is empty."""
    x, weight = cuda.aligned(x_MD), cuda.aligned(weight_D)
    residual = None if residual_MD is None else cuda.aligned(residual_MD)
    y, total, inverse = cuda_norm.forward(cuda.run, x, residual, weight, eps)
    return y, x_MD.new_empty(0) if residual_MD is None else total, inverse


@torch.library.custom_op("tinyllm::cuda_rms_norm_backward", mutates_args=())
def rms_norm_rows_backward(
    dy_MD: Tensor, sum_MD: Tensor, inverse_M: Tensor, weight_D: Tensor, dsum_MD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of s and of the weight."""
    dy, total, weight = (cuda.aligned(x) for x in (dy_MD, sum_MD, weight_D))
    dsum = None if dsum_MD is None else cuda.aligned(dsum_MD)
    return cuda_norm.backward(cuda.run, dy, total, inverse_M, weight, dsum)


@rms_norm_rows.register_fake
def _fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Tell the compiler the shapes of the results."""
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[0], dtype=torch.float32)


@rms_norm_rows_backward.register_fake
def _backward_fake(
    dy: Tensor, total: Tensor, inverse: Tensor, weight: Tensor, dsum: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Tell the compiler the shapes of the gradients."""
    return total.new_empty(total.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep what was normalised and the inverse root of its mean square."""
    x, residual, weight, _ = inputs
    _, total, inverse = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(total if ctx.has_residual else x, inverse, weight)
    ctx.mark_non_differentiable(inverse)
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, dy: Tensor, dsum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """Return a gradient for each argument: x and the residual have the same."""
    total, inverse, weight = ctx.saved_tensors
    other = dsum if ctx.has_residual else None
    dx, dweight = rms_norm_rows_backward(dy, total, inverse, weight, other)
    return dx, dx if ctx.has_residual else None, dweight, None


rms_norm_rows.register_autograd(_backward, setup_context=_keep)
