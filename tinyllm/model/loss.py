"""Head and cross-entropy as one function that never holds the logits of all positions.

The logits, (N, V), are the largest tensor of a training step: 2048 positions of 8192 tokens take
32 MB in bf16 and 64 MB more for each of their fp32 copy, its softmax and its gradient. Here a chunk
of positions goes from hidden state to loss and back before the next one begins, as its gradient
needs nothing but its own logits. Dimensions: N positions, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from tinyllm.ops.registry import function_of, select

CHUNK_ROWS = 256
"""Positions per chunk. Of 128, 256, 512, 1024 the fastest for V = 4096 and 8192, D = 256."""
MAX_CHUNKS = 16
"""Longer batches get longer chunks: the compiler unrolls the loop."""


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Return the sum over positions of -ln softmax(x W^T)[target], a scalar in fp32 or wider.

    The products run in autocast's format, softmax and sums in fp32; the gradient of the weight is
    summed over chunks in its own format. It can be differentiated once. Equal to
    `next_token_loss(F.linear(x, weight), targets)` but for rounding; with V = 4096 and 8192,
    D = 256, N = 2048, bf16, 2 cores it took 0.54 and 0.48 of its time in eager code, 0.91 and 0.87
    compiled.

    Args:
        x_ND: hidden states.
        weight_VD: of the head.
        targets_N: int64; -100 does not count.
    """
    device = x_ND.device.type
    cast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if cast else x_ND.dtype
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_ND, weight_VD, targets_N, dtype, weight_VD.requires_grad
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient for an upstream gradient of 1 is made on the way forward, then scaled."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        dtype: torch.dtype,
        learn_weight: bool,
    ) -> Tensor:
        """Return the loss; arguments as above, `dtype` is that of the products."""
        x, weight = x_ND.to(dtype), weight_VD.to(dtype)
        N, wide = len(x), torch.promote_types(dtype, torch.float32)
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight_VD) if learn_weight else None
        loss = torch.zeros((), dtype=wide, device=x.device)
        losses_of = function_of("cross_entropy", _backend(x.device.type, dtype, len(weight)))
        rows = max(CHUNK_ROWS, -(-N // MAX_CHUNKS))
        for start in range(0, N, rows):
            chunk, target = x[start : start + rows], targets_N[start : start + rows]
            losses, grad = losses_of(chunk @ weight.T, target)
            loss = loss + losses.sum()
            grad_x[start : start + rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ chunk
        ctx.dtype = x_ND.dtype
        ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and the weight."""
        grad_x, grad_weight = ctx.saved_tensors
        scaled = None if grad_weight is None else grad_weight * upstream
        return grad_x.to(ctx.dtype) * upstream, scaled, None, None, None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _backend(device: str, dtype: torch.dtype, vocabulary: int) -> str:
    """Return the name of the backend; the compiler asks once and does not look inside."""
    logits = torch.empty((0, vocabulary), dtype=dtype, device=device)
    return select("cross_entropy", logits).backend
