"""Attention of one new token over its KV cache, on a card: kernels/cuda/decode_attention.cu.

Dimensions: B sequences, H query heads, G key-value heads, S positions that the cache has
room for, K width.
"""

import ctypes
import math

import torch
from torch import Tensor

from tinyllm.ops.cuda_rows import FORMATS, Run, address, check_pointers
from tinyllm.ops.launch import Extent, Launch

SOURCE = "decode_attention.cu"
WIDTHS = (32, 64, 128)
CHUNKS = (256, 128, 64)
"""Keys of a block, from the largest, which has the fewest partial results."""
ENOUGH_BLOCKS = 256
"""So many keep every card busy: an H100 has 132 multiprocessors."""
HEADS = 8
"""Queries that share a block."""
THREADS = 128


class _Attention(ctypes.Structure):
    """`DecodeAttention` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "k_scale", "v_scale", "lengths")),
        *(("sums", ctypes.c_void_p), ("stats", ctypes.c_void_p), ("capacity", ctypes.c_int64)),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "chunk", "window")),
        ("scale", ctypes.c_float),
    )


class _Combine(ctypes.Structure):
    """`DecodeCombine` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("sums", "stats", "lengths", "y")),
        *((name, ctypes.c_int32) for name in ("splits", "chunk", "window")),
    )


def refuses(dtype: torch.dtype, d_head: int) -> str | None:
    """Return why the kernels cannot serve queries of a format and width, None if they can."""
    if dtype not in FORMATS or dtype == torch.float32:
        return f"it knows bf16 and fp16, not {dtype}"
    return None if d_head in WIDTHS else f"it knows head widths of {WIDTHS}, not {d_head}"


def attention(
    run: Run,
    q_BHK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    lengths_B: Tensor,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    window: int = 0,
    scale: float,
) -> Tensor:
    """Return softmax(scale q K^T) V over each sequence's own length, (B, H, K) in q's format.

    The shapes of the launches depend on the cache's room alone, the lengths are read on the card:
    a CUDA graph may be replayed while the cache fills.

    Args:
        run: executes launches.
        q_BHK: contiguous, bf16 or fp16.
        k_BGSK: the cache's whole memory, contiguous, q's format or int8.
        v_BGSK: likewise.
        lengths_B: int32, positions that are filled, the new one among them; at least 1.
        scales: fp32 (B, G, S) of keys and of values, with an int8 cache (`quantize_per_row`).
        window: the last so many positions only; 0: all.
        scale: of the scores.
    """
    batch, heads, width = q_BHK.shape
    kv_heads, capacity = k_BGSK.shape[1:3]
    k_scale, v_scale = scales or (None, None)
    check_pointers(q_BHK, k_BGSK, v_BGSK, k_scale, v_scale)
    if lengths_B.dtype != torch.int32 or (k_BGSK.dtype == torch.int8) != (scales is not None):
        raise ValueError("lengths must be int32, and an int8 cache has scales")
    tiles = -(-(heads // kv_heads) // HEADS)
    chunk = _chunk(batch * kv_heads * tiles, capacity)
    splits = -(-capacity // chunk)
    y = torch.empty_like(q_BHK)
    sums = q_BHK.new_empty((batch, heads, splits, width), dtype=torch.float32)
    stats = q_BHK.new_empty((batch, heads, splits, 2), dtype=torch.float32)
    split = _Attention(
        *(q_BHK.data_ptr(), k_BGSK.data_ptr(), v_BGSK.data_ptr()),
        *(address(k_scale), address(v_scale), lengths_B.data_ptr()),
        *(sums.data_ptr(), stats.data_ptr(), capacity, heads, kv_heads, chunk, window),
        scale / math.log(2),
    )
    join = _Combine(
        *(sums.data_ptr(), stats.data_ptr(), lengths_B.data_ptr(), y.data_ptr()),
        *(splits, chunk, window),
    )
    shared = 4 * HEADS * (width + CHUNKS[0] + THREADS // 32 * width)
    cache = "i8" if scales else FORMATS[k_BGSK.dtype]
    defines = (f"FORMAT={FORMATS[q_BHK.dtype]}", f"CACHE={cache}", f"WIDTH={width}")
    grid = splits, kv_heads * tiles, batch
    run(_launch("decode_attention", grid, shared, split, defines))
    run(_launch("decode_attention_combine", (heads, batch, 1), 0, join, defines))
    return y


def _launch(
    entry: str,
    grid: Extent,
    shared_bytes: int,
    arguments: ctypes.Structure,
    defines: tuple[str, ...],
) -> Launch:
    """Return the launch of one of the two kernels."""
    return Launch(
        source=SOURCE,
        entry=entry,
        grid=grid,
        block=(THREADS, 1, 1),
        shared_bytes=shared_bytes,
        arguments=arguments,
        defines=defines,
    )


def _chunk(blocks_per_split: int, capacity: int) -> int:
    """Return how many keys a block takes: as many as leave the card enough blocks."""
    for chunk in CHUNKS:
        if blocks_per_split * -(-capacity // chunk) >= ENOUGH_BLOCKS:
            return chunk
    return CHUNKS[-1]
