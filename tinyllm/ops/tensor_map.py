"""Encodes what Hopper's copy engine (TMA) knows of a tensor; only the driver knows the 128 bytes.

CUDA Driver API, `cuTensorMapEncodeTiled`; constants as in cuda.h.
"""

import ctypes
from collections.abc import Callable
from typing import Any

from tinyllm.ops.launch import TENSOR_MAP_BYTES, Launch

UINT16, INTERLEAVE_NONE, SWIZZLE_128B, PROMOTE_256B, FILL_ZEROS = 1, 0, 3, 3, 0
"""16 bits of any format; tiles as wgmma reads them; reads of 256 bytes from memory into L2."""
ALIGNMENT, BOX_WIDTH, RANK = 64, 64, 4


def encode(ask: Callable[..., None], launch: Launch) -> None:
    """Fill the first bytes of a launch's arguments, a map per tensor.

    Args:
        ask: calls the driver by name.
        launch: with tensors.

    Raises:
        DriverError: by `ask`, if the driver refuses a shape.
    """
    buffer = (ctypes.c_ubyte * (TENSOR_MAP_BYTES + ALIGNMENT))()
    at = ctypes.addressof(buffer)
    at += -at % ALIGNMENT
    for i, tensor in enumerate(launch.tensors):
        ask(
            "cuTensorMapEncodeTiled",
            *(ctypes.c_void_p(at), UINT16, RANK, ctypes.c_void_p(tensor.address)),
            *(_array(ctypes.c_uint64, tensor.sizes), _array(ctypes.c_uint64, tensor.strides)),
            _array(ctypes.c_uint32, (BOX_WIDTH, tensor.rows, 1, 1)),
            _array(ctypes.c_uint32, (1,) * RANK),
            *(INTERLEAVE_NONE, SWIZZLE_128B, PROMOTE_256B, FILL_ZEROS),
        )
        to = ctypes.addressof(launch.arguments) + i * TENSOR_MAP_BYTES
        ctypes.memmove(to, at, TENSOR_MAP_BYTES)


def _array(kind: Any, values: tuple[int, ...]) -> Any:
    """Return integers as C has them."""
    return (kind * len(values))(*values)
