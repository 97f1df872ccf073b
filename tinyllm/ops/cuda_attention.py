"""Fused attention in CUDA C++ (kernels/cuda/attention.h): its launches, from torch tensors.

Knows no driver: `run` is whatever executes a `Launch`, the card's own or the emulator of the tests,
and the tensors may lie on either. Dimensions as in `tinyllm.ops.flash`.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyllm.ops.attention_op import Heads, check_fit, empty_heads, heads_of, refuses_widths
from tinyllm.ops.launch import Launch

FORMATS = {torch.bfloat16: "bf16", torch.float16: "half"}
WARPS, LANES, RANGE, PADDING = 4, 32, 32, 384
"""Warps of a block, threads of a warp; positions of an entry of `Documents.ranges`; T's padding,
whole blocks of rows and of columns in every kernel."""
NARROW = 64
"""Up to this width tiles are larger: the registers hold them (docs/cuda-attention.md)."""
TILES = {
    # entry, file: (ROW_TILES, COLUMNS) of narrow heads, of wide ones, of wide ones on ROOMY cards
    "attention_forward": ((2, 64), (1, 32), (2, 32)),
    "attention_backward_queries": ((2, 32), (1, 32), (1, 32)),
    "attention_backward_keys": ((2, 32), (1, 32), (1, 32)),
}
ROOMY = ((8, 0), (9, 0))
"""Cards (A100, H100) with shared memory for two blocks of 64 KB per multiprocessor."""
Run = Callable[[Launch], object]


class _Attention(ctypes.Structure):
    """`tinyllm::Attention` of kernels/cuda/attention.h."""

    _fields_ = (
        *((name, Heads) for name in ("q", "k", "v", "o", "d_o", "d_q", "d_k", "d_v")),
        *((name, ctypes.c_void_p) for name in ("lse", "delta", "documents", "ranges")),
        ("padded", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("n_tokens", "n_heads", "n_kv_heads", "window")),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """Which document each position belongs to, as the kernels read it."""

    ids: Tensor
    """(B, padded) int32, T rounded up to a multiple of PADDING; the last one repeated."""
    ranges: Tensor
    """(B, padded / 32, 2) int32: least and largest id of 32 positions; whole blocks are skipped."""


def refuses(dtype: torch.dtype, width: int, value_width: int) -> str | None:
    """Return why the kernels cannot serve such heads, None if they can."""
    if dtype not in FORMATS:
        return f"it knows bf16 and fp16, not {dtype}"
    return refuses_widths(width, value_width)


def forward(
    run: Run,
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTE: Tensor,
    document_ids: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return what `attention_op.as_operator` tells; bf16 or fp16, accumulated in fp32.

    Raises:
        ValueError: as `check_fit`.
    """
    check_fit(q_BHTK, k_BGTK, v_BGTE, document_ids)
    q, k, v = (_aligned(x) for x in (q_BHTK, k_BGTK, v_BGTE))
    o = empty_heads(q, v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    documents = _documents(document_ids)
    problem = _problem(q, k, v, o, lse, documents, window, scale)
    run(_launch("attention_forward", q, v, problem, q))
    return o, lse


def backward(
    run: Run,
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
    """Return the gradients of q, k and v: the same bits in every run.

    Raises:
        ValueError: as `check_fit`.
    """
    check_fit(q_BHTK, k_BGTK, v_BGTE, document_ids)
    d_o, q, k, v, o = (_aligned(x) for x in (d_o, q_BHTK, k_BGTK, v_BGTE, o_BHTE))
    d_q, d_k, d_v = (empty_heads(x, x.shape[-1]) for x in (q, k, v))
    lse, delta = (
        lse_BHT.contiguous(),
        torch.empty_like(lse_BHT, memory_format=torch.contiguous_format),
    )
    documents = _documents(document_ids)
    problem = _problem(q, k, v, o, lse, documents, window, scale)
    problem.d_o, problem.delta = heads_of(d_o), delta.data_ptr()
    problem.d_q, problem.d_k, problem.d_v = (heads_of(x) for x in (d_q, d_k, d_v))
    run(_launch("attention_backward_queries", q, v, problem, q))  # also writes delta
    run(_launch("attention_backward_keys", q, v, problem, k))
    return d_q, d_k, d_v


def programs(
    dtype: torch.dtype, width: int, value_width: int, *, roomy: bool = False
) -> dict[str, tuple[str, ...]]:
    """Return the macros that each kernel is compiled with, by entry (its file is entry.cu)."""
    return {
        entry: (
            f"FORMAT={FORMATS[dtype]}",
            f"WIDTH={width}",
            f"VALUE_WIDTH={value_width}",
            f"ROW_TILES={row_tiles}",
            f"COLUMNS={columns}",
        )
        for entry in TILES
        for row_tiles, columns in [_tiles(entry, width, value_width, roomy)]
    }


def _tiles(entry: str, width: int, value_width: int, roomy: bool) -> tuple[int, int]:
    """Return ROW_TILES and COLUMNS."""
    narrow, wide, wide_if_roomy = TILES[entry]
    if max(width, value_width) <= NARROW:
        return narrow
    return wide_if_roomy if roomy else wide


def is_roomy(device: torch.device) -> bool:
    """Return whether the card is one of ROOMY."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in ROOMY


def _launch(entry: str, q: Tensor, v: Tensor, problem: _Attention, owner: Tensor) -> Launch:
    """Return the launch of a kernel whose blocks each own some rows of `owner`."""
    width, value_width = q.shape[-1], v.shape[-1]
    roomy = is_roomy(q.device)
    row_tiles, columns = _tiles(entry, width, value_width, roomy)
    rows = WARPS * 16 * row_tiles
    shared = (width + value_width) * 2 * (2 * columns)  # two halves of what passes by
    if entry == "attention_forward":
        shared += width * 2 * rows
    else:
        shared += (width + value_width) * 2 * rows
    if entry == "attention_backward_keys":
        shared += 2 * 2 * columns * 4  # lse and delta
    batch, heads, n_tokens, _ = owner.shape
    return Launch(
        source=f"{entry}.cu",
        entry=entry,
        grid=(-(-n_tokens // rows), heads, batch),
        block=(WARPS * LANES, 1, 1),
        shared_bytes=shared,
        arguments=problem,
        defines=programs(q.dtype, width, value_width, roomy=roomy)[entry],
    )


def _documents(document_ids: Tensor | None) -> Documents | None:
    """Return (B, T) integers as the kernels read them."""
    if document_ids is None:
        return None
    b, t = document_ids.shape
    ids = document_ids.to(torch.int32)
    ids = torch.cat((ids, ids[:, -1:].expand(b, -t % PADDING)), 1).contiguous()
    blocks = ids.view(b, -1, RANGE)
    return Documents(ids=ids, ranges=torch.stack((blocks.amin(-1), blocks.amax(-1)), -1))


def _aligned(x: Tensor) -> Tensor:
    """Return x so that each head begins at a multiple of 16 bytes; a copy where it does not."""
    whole = x.stride(-1) == 1 and not any(s % 8 for s in x.stride()[:3]) and not x.data_ptr() % 16
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    documents: Documents | None,
    window: int,
    scale: float,
) -> _Attention:
    """Return the description of a problem; it holds bare addresses, the caller keeps the tensors.

    They fit together (`check_fit`).
    """
    return _Attention(
        *(heads_of(x) for x in (q, k, v, o)),
        *(Heads() for _ in range(4)),
        lse.data_ptr(),
        None,
        None if documents is None else documents.ids.data_ptr(),
        None if documents is None else documents.ranges.data_ptr(),
        0 if documents is None else documents.ids.shape[1],
        *(q.shape[2], q.shape[1], k.shape[1], window, scale),
    )
