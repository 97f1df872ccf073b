"""What our attention on a CPU and that on a card share: the torch operator, and how heads lie.

Autograd and `torch.compile` know such an operator, the latter takes it whole. Dimensions: B batch,
T positions, H query heads, G key-value heads, K width of queries and keys, E width of values.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Forward = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, int, float],
    tuple[Tensor, Tensor],
]
"""(q, k, v, document_ids, window, scale) to (o, lse)."""
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, int, float],
    tuple[Tensor, Tensor, Tensor],
]
"""(d_o, q, k, v, o, lse, document_ids, window, scale) to the gradients of q, k and v."""
MAX_WIDTH = 128
"""Of a head, in numbers; a multiple of 16."""
_OPTIONS = "Tensor? document_ids, int window, float scale"
_SCHEMA = f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    f"(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)"
)


class Heads(ctypes.Structure):
    """`tinyllm::Heads` of kernels/cpu/flash.h and kernels/cuda/attention.h: where a tensor lies."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("token", ctypes.c_int64),
    )


def heads_of(x: Tensor) -> Heads:
    """Return where a tensor (B, heads, T, width) lies; the caller keeps it."""
    return Heads(x.data_ptr(), *x.stride()[:3])


def refuses_widths(width: int, value_width: int) -> str | None:
    """Return why the native kernels cannot serve heads so wide, None if they can."""
    for name, n in (("heads", width), ("values", value_width)):
        if n % 16 or not 0 < n <= MAX_WIDTH:
            return f"{name} have {n} numbers, not a multiple of 16 up to {MAX_WIDTH}"
    return None


def check_fit(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTE: Tensor, document_ids: Tensor | None) -> None:
    """Refuse what the native kernels would read wrongly.

    Raises:
        ValueError: the shapes or formats do not fit together.
    """
    b, h, t, width = q_BHTK.shape
    g, value_width = k_BGTK.shape[1], v_BGTE.shape[-1]
    if k_BGTK.shape != (b, g, t, width) or v_BGTE.shape != (b, g, t, value_width) or h % g:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_BHTK, k_BGTK, v_BGTE))
        raise ValueError(f"queries, keys and values do not fit together: {shapes}")
    if not q_BHTK.dtype == k_BGTK.dtype == v_BGTE.dtype:
        dtypes = f"{q_BHTK.dtype}, {k_BGTK.dtype}, {v_BGTE.dtype}"
        raise ValueError(f"one number format is needed, got {dtypes}")
    if document_ids is not None and document_ids.shape != (b, t):
        raise ValueError(f"document_ids must be {(b, t)}, not {tuple(document_ids.shape)}")


def as_operator(
    name: str, forward: Forward, backward: Backward, device_types: str | None
) -> tuple[Any, Any]:
    """Return attention as the operator `name`, and its backward pass, `name`_backward.

    The first returns causal attention, (B, H, T, E), and ln sum exp of scores, (B, H, T) in fp32.

    Args:
        name: such as "tinyllm::flash_attention".
        forward: q (B, H, T, K), k (B, G, T, K), v (B, G, T, E); query head h reads key-value head
            h // (H / G); document_ids (B, T) or None: positions see only their own document;
            window: a query sees its own position and window - 1 before it, 0: all; scale of the
            scores. Results as `empty_heads` makes them.
        backward: likewise.
        device_types: what it runs on; None: anything.
    """
    operator = torch.library.custom_op(
        name, forward, mutates_args=(), device_types=device_types, schema=_SCHEMA
    )
    gradient = torch.library.custom_op(
        f"{name}_backward",
        backward,
        mutates_args=(),
        device_types=device_types,
        schema=_BACKWARD_SCHEMA,
    )
    operator.register_fake(_forward_fake)
    gradient.register_fake(_backward_fake)

    def run_backward(ctx: Any, d_o: Tensor, _: Tensor | None) -> tuple[Any, ...]:
        """Return a gradient for each argument of the operator."""
        q, k, v, o, lse, document_ids = ctx.saved_tensors
        return (*gradient(d_o, q, k, v, o, lse, document_ids, *ctx.options), None, None, None)

    operator.register_autograd(run_backward, setup_context=_keep)
    return operator, gradient


def without_lse(operator: Any) -> Callable[..., Tensor]:
    """Return a function like `reference.attention` that an operator of `as_operator` computes."""

    def attention(*arguments: Any) -> Tensor:
        """Return the output alone, (B, H, T, E)."""
        y: Tensor = operator(*arguments)[0]
        return y

    return attention


def empty_heads(like: Tensor, width: int) -> Tensor:
    """Return memory for (B, heads, T, width) in the order (B, T, heads, width): as layers read."""
    b, heads, t, _ = like.shape
    return like.new_empty((b, t, heads, width)).transpose(1, 2)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Tell the compiler the shapes and strides of the results."""
    return empty_heads(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward_fake(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    document_ids: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tell the compiler the shapes and strides of the gradients."""
    d_q, d_k, d_v = (empty_heads(x, x.shape[-1]) for x in (q, k, v))
    return d_q, d_k, d_v


def _keep(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, int, float],
    output: tuple[Tensor, Tensor],
) -> None:
    """Keep what the backward pass needs; the scores are computed again there."""
    q, k, v, document_ids, window, scale = inputs
    ctx.save_for_backward(q, k, v, *output, document_ids)
    ctx.options = (window, scale)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(True)
