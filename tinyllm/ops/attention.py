"""Causal attention as callers use it: a backend is chosen, also within a compiled model.

Dimensions: B batch, T positions, H query heads, G key-value heads, K width of queries and keys,
E width of values.
"""

import functools
import logging

import torch
from torch import Tensor

from tinyllm.ops.flash import AttentionSizes
from tinyllm.ops.registry import forced_backend, function_of, select, why_not


def attention(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTE: Tensor,
    *,
    document_ids: Tensor | None = None,
    window: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Return causal attention of whole sequences, (B, H, T, E); `reference.attention` defines it.

    Args:
        q_BHTK: queries.
        k_BGTK: keys; query head h reads key-value head h // (H / G), as Hugging Face maps them.
        v_BGTE: values.
        document_ids: (B, T) integers, positions see only their own document; None: one document.
        window: a query sees its own position and window - 1 before it; 0: all.
        scale: of the scores, positive; None: 1 / sqrt(K).

    Raises:
        ValueError: the tensors do not fit together.
    """
    width = q_BHTK.shape[-1]
    if q_BHTK.shape[1] % k_BGTK.shape[1] or k_BGTK.shape[:3] != v_BGTE.shape[:3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_BHTK, k_BGTK, v_BGTE))
        raise ValueError(f"queries, keys and values do not fit together: {shapes}")
    backend = _backend(q_BHTK.device.type, q_BHTK.dtype, width, v_BGTE.shape[-1])
    scale = width**-0.5 if scale is None else scale
    run = function_of("attention", backend)
    y: Tensor = run(q_BHTK, k_BGTK, v_BGTE, document_ids, window, scale)
    return y


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _backend(device: str, dtype: torch.dtype, width: int, value_width: int) -> str:
    """Return the name of the backend; the compiler asks once and does not look inside.

    Where the device's own cannot serve, one line says why.
    """
    sizes = AttentionSizes(
        device=torch.device(device), dtype=dtype, width=width, value_width=value_width
    )
    chosen = select("attention", sizes)
    free = chosen.backend != device and forced_backend() is None
    if free and (reason := why_not("attention", device, sizes)):
        _say_once(reason)
    return chosen.backend


@functools.cache
def _say_once(reason: str) -> None:
    """Tell about a fallback, once for each reason."""
    logging.getLogger("tinyllm.ops").info("attention runs on torch: %s", reason)
