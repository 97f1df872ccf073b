"""Attention's forward kernel for Hopper (H100, H200): wgmma and TMA, not mma.sync and cp.async.

Not the default: no card has measured it yet (docs/cuda-attention.md). TINYLLM_CUDA_ATTENTION=hopper
takes it where it can serve, and `make gpu-check` measures both.
"""

import ctypes
import functools
import os
from dataclasses import replace

import torch

from tinyllm.errors import TinyllmError
from tinyllm.ops.launch import TENSOR_MAP_BYTES, Launch, TensorMap

ENTRY, REPLACES = "attention_forward_hopper", "attention_forward"
CAPABILITY = (9, 0)
WIDTHS = (64, 128)
"""Of queries and keys and, each for itself, of values."""
WARPGROUPS = {64: 3, 128: 2}
"""That multiply, each with 64 queries, by the wider of both widths; one more fetches."""
COLUMNS, STAGES = 128, 2
"""Keys of a block; blocks of keys on their way or in use."""
GROUP_ROWS, THREADS = 64, 128
"""Queries and threads of a warpgroup."""
VARIABLE, CHOICES = "TINYLLM_CUDA_ATTENTION", ("mma", "hopper")


def is_wanted() -> bool:
    """Return whether the environment asks for this kernel.

    Raises:
        TinyllmError: it asks for one that there is not.
    """
    wanted = os.environ.get(VARIABLE, CHOICES[0])
    if wanted not in CHOICES:
        raise TinyllmError(f"{VARIABLE}: {wanted!r} is not one of {', '.join(CHOICES)}")
    return wanted == "hopper"


def is_hopper() -> bool:
    """Return whether the current card has wgmma."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == CAPABILITY


def refuses(launch: Launch) -> str | None:
    """Return why the kernel cannot do what a launch of `cuda_attention` does, None if it can."""
    if launch.entry != REPLACES:
        return f"it does not replace {launch.entry}"
    if not is_hopper():
        return "the card is no Hopper"
    widths = _widths(launch)
    return None if set(widths) <= set(WIDTHS) else f"widths {widths} are not among {WIDTHS}"


def of(launch: Launch) -> Launch:
    """Return the launch of this kernel that does what one of the mma.sync kernel does."""
    width, value_width = _widths(launch)
    warpgroups = WARPGROUPS[max(width, value_width)]
    rows = warpgroups * GROUP_ROWS
    problem = launch.arguments
    tiles = rows * width + STAGES * COLUMNS * (width + value_width)
    _, heads, batch = launch.grid
    arguments = _structure(type(problem))()
    arguments.problem = problem
    t, kv_heads = problem.n_tokens, problem.n_kv_heads
    return replace(
        launch,
        source=f"{ENTRY}.cu",
        entry=ENTRY,
        grid=(-(-t // rows), heads, batch),
        block=((warpgroups + 1) * THREADS, 1, 1),
        shared_bytes=tiles * 2 + (1 + 4 * STAGES) * 8,
        arguments=arguments,
        tensors=(
            _tensor(problem.q, (width, t, heads, batch), rows),
            _tensor(problem.k, (width, t, kv_heads, batch), COLUMNS),
            _tensor(problem.v, (value_width, t, kv_heads, batch), COLUMNS),
        ),
        defines=(
            *launch.defines[:3],
            "ROW_TILES=1",
            f"COLUMNS={COLUMNS}",
            f"WARPGROUPS={warpgroups}",
            f"STAGES={STAGES}",
        ),
    )


def _widths(launch: Launch) -> tuple[int, int]:
    """Return the widths of keys and of values that a launch is compiled for."""
    macros = dict(define.split("=") for define in launch.defines)
    return int(macros["WIDTH"]), int(macros["VALUE_WIDTH"])


def _tensor(heads: ctypes.Structure, sizes: tuple[int, int, int, int], rows: int) -> TensorMap:
    """Return what the copy engine must know of heads, `tinyllm::Heads` of 16-bit numbers."""
    strides = (2 * heads.token, 2 * heads.head, 2 * heads.batch)
    return TensorMap(address=heads.data, sizes=sizes, strides=strides, rows=rows)


@functools.cache
def _structure(problem: type[ctypes.Structure]) -> type[ctypes.Structure]:
    """Return `tinyllm::HopperAttention`; `problem` is `tinyllm::Attention`."""
    fields = (("maps", ctypes.c_ubyte * (3 * TENSOR_MAP_BYTES)), ("problem", problem))
    return type("HopperAttention", (ctypes.Structure,), {"_fields_": fields})
