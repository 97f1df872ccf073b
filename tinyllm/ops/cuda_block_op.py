"""RoPE, SwiGLU and attention of one token by CUDA C++ as torch operators.

Dimensions: M rows (tokens of all sequences), B sequences, T positions, H query heads, G key-value
heads, K head width, S positions that a cache has room for, F feed-forward width.
"""

from typing import Any

import torch
from torch import Tensor

from tinyllm.ops import cuda, cuda_decode, cuda_driver, cuda_pointwise
from tinyllm.ops.cuda_rows import FORMATS, format_define


def refuses_rope(x_BTHK: Tensor) -> str | None:
    """Return why the kernel cannot turn such heads, None if it can; compiles it."""
    return _refuses_pointwise(x_BTHK, x_BTHK.shape[-1] // 2)


def refuses_swiglu(gate: Tensor) -> str | None:
    """Return why the kernel cannot serve such rows, (..., F), None if it can; compiles it."""
    return _refuses_pointwise(gate, gate.shape[-1])


def _refuses_pointwise(x: Tensor, width: int) -> str | None:
    """Return why a kernel of pointwise.cu cannot serve x, None if it can; compiles it."""
    if reason := cuda_pointwise.refuses(x.dtype, width) or cuda_driver.obstacle(x.device):
        return reason
    return cuda_driver.refuses(x.device, cuda_pointwise.SOURCE, format_define(x.dtype))


def rope(q_BTHK: Tensor, k_BTGK: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `reference.rope` does."""
    cos, sin = (x.reshape(-1, x.shape[-1]).float() for x in (cos, sin))
    q, k = rope_rows(q_BTHK.flatten(0, 1), k_BTGK.flatten(0, 1), cos, sin, False)
    return q.view(q_BTHK.shape), k.view(k_BTGK.shape)


@torch.library.custom_op("tinyllm::cuda_rope", mutates_args=())
def rope_rows(
    q_MHK: Tensor, k_MGK: Tensor, cos: Tensor, sin: Tensor, back: bool
) -> tuple[Tensor, Tensor]:
    """Return turned queries and keys; row i % T of the tables belongs to row i."""
    q, k = (x.clone(memory_format=torch.contiguous_format) for x in (q_MHK, k_MGK))
    cuda_pointwise.rope(cuda.run, q, k, cuda.aligned(cos), cuda.aligned(sin), back=back)
    return q, k


@rope_rows.register_fake
def _rope_fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """Tell the compiler the shapes of the results."""
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _rope_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the angles."""
    _, _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _rope_backward(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor | None, ...]:
    """Turn the gradients the other way."""
    return (*rope_rows(d_q, d_k, *ctx.saved_tensors, not ctx.back), None, None, None)


rope_rows.register_autograd(_rope_backward, setup_context=_rope_keep)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Do what `reference.swiglu` does; computed in fp32, rounded once."""
    width = gate.shape[-1]
    y: Tensor = swiglu_rows(gate.reshape(-1, width), up.reshape(-1, width))
    return y.view(gate.shape)


@torch.library.custom_op("tinyllm::cuda_swiglu", mutates_args=())
def swiglu_rows(gate_MF: Tensor, up_MF: Tensor) -> Tensor:
    """Return silu(gate) up of rows."""
    return cuda_pointwise.swiglu(cuda.run, cuda.aligned(gate_MF), cuda.aligned(up_MF))


@torch.library.custom_op("tinyllm::cuda_swiglu_backward", mutates_args=())
def swiglu_rows_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    return cuda_pointwise.swiglu_backward(cuda.run, *(cuda.aligned(x) for x in (dy, gate, up)))


@swiglu_rows.register_fake
def _swiglu_fake(gate: Tensor, up: Tensor) -> Tensor:
    """Tell the compiler the shape of the result."""
    return gate.new_empty(gate.shape)


@swiglu_rows_backward.register_fake
def _swiglu_backward_fake(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Tell the compiler the shapes of the gradients."""
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _swiglu_keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    """Keep both factors."""
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients."""
    gradients: tuple[Tensor, Tensor] = swiglu_rows_backward(dy, *ctx.saved_tensors)
    return gradients


swiglu_rows.register_autograd(_swiglu_backward, setup_context=_swiglu_keep)


def refuses_decode(q_BHK: Tensor) -> str | None:
    """Return why the kernels cannot serve queries over a cache of their format; compiles them."""
    dtype, width = q_BHK.dtype, q_BHK.shape[-1]
    if reason := cuda_decode.refuses(dtype, width) or cuda_driver.obstacle(q_BHK.device):
        return reason
    name = FORMATS[dtype]
    defines = (f"FORMAT={name}", f"CACHE={name}", f"WIDTH={width}")
    return cuda_driver.refuses(q_BHK.device, cuda_decode.SOURCE, defines)


@torch.library.custom_op("tinyllm::cuda_decode_attention", mutates_args=())
def decode_attention(
    q_BHK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, lengths_B: Tensor, window: int, scale: float
) -> Tensor:
    """Do what `reference.decode_attention` does."""
    q, k, v = (cuda.aligned(x) for x in (q_BHK, k_BGSK, v_BGSK))
    lengths = lengths_B.to(torch.int32).contiguous()
    return cuda_decode.attention(cuda.run, q, k, v, lengths, window=window, scale=scale)


@decode_attention.register_fake
def _decode_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window: int, scale: float
) -> Tensor:
    """Tell the compiler the shape of the result."""
    return q.new_empty(q.shape)
