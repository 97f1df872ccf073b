"""RMSNorm, RoPE, SwiGLU, attention of one token as callers use them: a backend is chosen.

Dimensions as in `reference`.
"""

import torch
from torch import Tensor

from tinyllm.ops.registry import function_of, select


def is_alone(x: Tensor) -> bool:
    """Whether a layer's own kernel pays for x: on a card, in eager code.

    The compiler fuses such a layer with its neighbours; and graphs that are exported, which happens
    on the CPU, must hold torch's operators alone.
    """
    return x.is_cuda and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return x normalised over its last dimension, (..., D); `reference.rms_norm` defines it."""
    backend = _backend("rms_norm", str(x.device), x.dtype, x.shape[-1])
    y: Tensor = function_of("rms_norm", backend)(x, weight_D, eps)
    return y


def rope(q_BTHK: Tensor, k_BTGK: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys turned by the angles; `reference.rope` defines it."""
    run = function_of("rope", _backend("rope", str(q_BTHK.device), q_BTHK.dtype, q_BTHK.shape[-1]))
    turned: tuple[Tensor, Tensor] = run(q_BTHK, k_BTGK, cos, sin)
    return turned


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, (..., F)."""
    backend = _backend("swiglu", str(gate.device), gate.dtype, gate.shape[-1])
    y: Tensor = function_of("swiglu", backend)(gate, up)
    return y


def decode_attention(
    q_BHK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, lengths_B: Tensor, *, window: int, scale: float
) -> Tensor:
    """Return attention of one token per sequence; `reference.decode_attention` defines it."""
    backend = _backend("decode_attention", str(q_BHK.device), q_BHK.dtype, q_BHK.shape[-1])
    run = function_of("decode_attention", backend)
    y: Tensor = run(q_BHK, k_BGSK, v_BGSK, lengths_B, window, scale)
    return y


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _backend(operation: str, device: str, dtype: torch.dtype, width: int) -> str:
    """Return the name of the backend; the compiler asks once and does not look inside."""
    return select(operation, torch.empty((0, width), dtype=dtype, device=device)).backend
