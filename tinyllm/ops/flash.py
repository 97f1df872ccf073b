"""Attention by our C++ (kernels/cpu/flash.h), the torch operator `tinyllm::flash_attention`.

Same bits for any number of threads. Dimensions: B batch, T positions, H query heads,
G key-value heads, K width of queries and keys, E width of values.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyllm.ops import cpu
from tinyllm.ops.attention_op import (
    Heads,
    as_operator,
    check_fit,
    empty_heads,
    heads_of,
    refuses_widths,
    without_lse,
)

FORMATS = (torch.float32, torch.bfloat16)


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


class _Attention(ctypes.Structure):
    """`tinyllm::Attention` of kernels/cpu/flash.h."""

    _fields_ = (
        *((name, Heads) for name in ("q", "k", "v", "o", "d_o", "d_q", "d_k", "d_v")),
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
    if reason := refuses_widths(sizes.width, sizes.value_width) or cpu.refuses(sizes.device):
        return reason
    return "it needs AVX2" if cpu.best_isa() == 0 else None


def _forward(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTE: Tensor,
    document_ids: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return attention and log-sum-exp as `as_operator` tells."""
    q, k, v = (_rows(x) for x in (q_BHTK, k_BGTK, v_BGTE))
    document_ids = _ids(document_ids)
    o = empty_heads(q, v.shape[-1])
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    problem = _problem(q, k, v, o, lse, document_ids, window, scale)
    library, _ = cpu.load()
    cpu.check(library.tinyllm_flash_forward(ctypes.addressof(problem), cpu.n_threads()))
    return o, lse


def _backward(
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
    document_ids = _ids(document_ids)
    gradients = [empty_heads(x, x.shape[-1]) for x in (q, k, v)]
    problem = _problem(q, k, v, o, lse_BHT.contiguous(), document_ids, window, scale)
    problem.d_o = heads_of(d_o)
    problem.d_q, problem.d_k, problem.d_v = (heads_of(x) for x in gradients)
    library, _ = cpu.load()
    cpu.check(library.tinyllm_flash_backward(ctypes.addressof(problem), cpu.n_threads()))
    d_q, d_k, d_v = gradients
    return d_q, d_k, d_v


flash_attention, flash_attention_backward = as_operator(
    "tinyllm::flash_attention", _forward, _backward, "cpu"
)
attention = without_lse(flash_attention)
"""Does what `reference.attention` does."""


def _rows(x: Tensor) -> Tensor:
    """Return x with the numbers of a head side by side; other strides are free."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _ids(document_ids: Tensor | None) -> Tensor | None:
    """Return the ids as the kernel reads them."""
    return None if document_ids is None else document_ids.to(torch.int32).contiguous()


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
        ValueError: the tensors do not fit together.
    """
    check_fit(q, k, v, document_ids)
    b, h, t, width = q.shape
    return _Attention(
        *(heads_of(x) for x in (q, k, v, o)),
        *(Heads() for _ in range(4)),
        lse.data_ptr(),
        None if document_ids is None else document_ids.data_ptr(),
        *(b, t, h, k.shape[1], width, v.shape[-1], window),
        *(scale, int(q.dtype == torch.bfloat16), cpu.best_isa()),
    )
