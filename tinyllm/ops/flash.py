"""Attention by our C++ (kernels/cpu/flash.h) as a torch operator with a gradient.

`tinyllm::flash_attention` is known to autograd and to `torch.compile`, which takes it whole. Same
bits for any number of threads. Dimensions: B batch, T positions, H query heads, G key-value heads,
K width of queries and keys, E width of values.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyllm.ops import cpu

FORMATS = (torch.float32, torch.bfloat16)
MAX_WIDTH = 128
"""Widths are multiples of 16 up to this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSizes:
    """What the choice of a backend depends on."""

    device: torch.device
    """Of the tensors."""
    dtype: torch.dtype
    """Their number format."""
    width: int
    """K."""
    value_width: int
    """E."""


class _Heads(ctypes.Structure):
    """`tinyllm::Heads` of kernels/cpu/flash.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("token", ctypes.c_int64),
    )


class _Attention(ctypes.Structure):
    """`tinyllm::Attention` of kernels/cpu/flash.h."""

    _fields_ = (
        *((name, _Heads) for name in ("q", "k", "v", "o", "d_o", "d_q", "d_k", "d_v")),
        ("lse", ctypes.c_void_p),
        ("documents", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n_batch", "n_tokens", "n_heads", "n_kv_heads")),
        *((name, ctypes.c_int64) for name in ("width", "value_width", "window")),
        ("scale", ctypes.c_float),
        ("is_bf16", ctypes.c_int64),
        ("isa", ctypes.c_int64),
    )


def refuses(sizes: AttentionSizes) -> str | None:
    """Return why the kernel cannot serve such tensors, None if it can; builds the library."""
    if sizes.dtype not in FORMATS:
        return f"it knows fp32 and bf16, not {sizes.dtype}"
    for name, width in (("heads", sizes.width), ("values", sizes.value_width)):
        if width % 16 or not 0 < width <= MAX_WIDTH:
            return f"{name} have {width} numbers, not a multiple of 16 up to {MAX_WIDTH}"
    if reason := cpu.refuses(sizes.device):
        return reason
    return "it needs AVX2" if cpu.best_isa() == 0 else None


def attention(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTE: Tensor,
    document_ids: Tensor | None,
    window: int,
    scale: float,
) -> Tensor:
    """Do what `reference.attention` does."""
    if document_ids is not None:
        document_ids = document_ids.to(torch.int32).contiguous()
    y: Tensor = flash_attention(q_BHTK, k_BGTK, v_BGTE, document_ids, window, scale)[0]
    return y


@torch.library.custom_op("tinyllm::flash_attention", mutates_args=(), device_types="cpu")
def flash_attention(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTE: Tensor,
    document_ids: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return causal attention, (B, H, T, E), and ln sum exp of the scores, (B, H, T) in fp32.

    Args:
        q_BHTK: queries, bf16 or fp32.
        k_BGTK: keys; query head h reads key-value head h // (H / G).
        v_BGTE: values.
        document_ids: (B, T) int32, contiguous: positions see only their own document; or None.
        window: a query sees its own position and window - 1 before it; 0: all.
        scale: of the scores, positive.
    """
    q, k, v = (_rows(x) for x in (q_BHTK, k_BGTK, v_BGTE))
    o = _empty_heads(q, v.shape[-1])
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    problem = _problem(q, k, v, o, lse, document_ids, window, scale)
    library, _ = cpu.load()
    cpu.check(library.tinyllm_flash_forward(ctypes.addressof(problem), cpu.n_threads()))
    return o, lse


@torch.library.custom_op("tinyllm::flash_attention_backward", mutates_args=(), device_types="cpu")
def flash_attention_backward(
    d_o: Tensor,
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTE: Tensor,
    o_BHTE: Tensor,
    lse_BHT: Tensor,
    document_ids: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values from that of the output."""
    d_o, q, k, v, o = (_rows(x) for x in (d_o, q_BHTK, k_BGTK, v_BGTE, o_BHTE))
    gradients = [_empty_heads(x, x.shape[-1]) for x in (q, k, v)]
    problem = _problem(q, k, v, o, lse_BHT.contiguous(), document_ids, window, scale)
    problem.d_o = _heads(d_o)
    problem.d_q, problem.d_k, problem.d_v = (_heads(x) for x in gradients)
    library, _ = cpu.load()
    cpu.check(library.tinyllm_flash_backward(ctypes.addressof(problem), cpu.n_threads()))
    d_q, d_k, d_v = gradients
    return d_q, d_k, d_v


@flash_attention.register_fake
def _flash_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Tell the compiler the shapes and strides of the results."""
    return _empty_heads(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@flash_attention_backward.register_fake
def _flash_attention_backward_fake(
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
    d_q, d_k, d_v = (_empty_heads(x, x.shape[-1]) for x in (q, k, v))
    return d_q, d_k, d_v


def _keep(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, int, float],
    output: tuple[Tensor, Tensor],
) -> None:
    """Keep what the backward pass needs; the scores are computed again there."""
    q, k, v, document_ids, window, scale = inputs
    ctx.save_for_backward(q, k, v, *output, document_ids)  # type: ignore[arg-type]
    ctx.options = (window, scale)  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(True)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, d_o: Tensor, _: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
    """Return a gradient for each argument; the log-sum-exp has none."""
    q, k, v, o, lse, document_ids = ctx.saved_tensors  # type: ignore[attr-defined]
    arguments = (d_o, q, k, v, o, lse, document_ids, *ctx.options)  # type: ignore[attr-defined]
    return (*flash_attention_backward(*arguments), None, None, None)


flash_attention.register_autograd(_backward, setup_context=_keep)


def _rows(x: Tensor) -> Tensor:
    """Return x with the numbers of a head side by side; other strides are free."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_heads(like: Tensor, width: int) -> Tensor:
    """Return memory for (B, heads, T, width) in the order (B, T, heads, width): as layers read."""
    b, heads, t, _ = like.shape
    return like.new_empty((b, t, heads, width)).transpose(1, 2)


def _heads(x: Tensor) -> _Heads:
    """Return where a tensor lies."""
    return _Heads(x.data_ptr(), *x.stride()[:3])


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    document_ids: Tensor | None,
    window: int,
    scale: float,
) -> _Attention:
    """Return the description of a problem; it holds bare addresses, the caller keeps the tensors.

    Raises:
        ValueError: the shapes or formats do not fit together.
    """
    b, h, t, width = q.shape
    g, value_width = k.shape[1], v.shape[-1]
    if k.shape != (b, g, t, width) or v.shape != (b, g, t, value_width) or h % g:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"queries, keys and values do not fit together: {shapes}")
    if not q.dtype == k.dtype == v.dtype == o.dtype:
        raise ValueError(f"one number format is needed, got {q.dtype}, {k.dtype}, {v.dtype}")
    if document_ids is not None and (
        document_ids.shape != (b, t)
        or document_ids.dtype != torch.int32
        or not document_ids.is_contiguous()
    ):
        raise ValueError("document_ids must be int32, (B, T), contiguous")
    return _Attention(
        *(_heads(x) for x in (q, k, v, o)),
        *(_Heads() for _ in range(4)),
        lse.data_ptr(),
        None if document_ids is None else document_ids.data_ptr(),
        *(b, t, h, g, width, value_width, window),
        *(scale, int(q.dtype == torch.bfloat16), cpu.best_isa()),
    )
