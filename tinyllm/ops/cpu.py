"""Backend `cpu`: our C++ in kernels/cpu, called through ctypes.

Called directly rather than as `torch.library` operators: a call costs 1.6 us this way and 5 to 8 us
as a custom operator, and decoding makes dozens per token. Inference only: no gradients.
Dimensions: M rows, N outputs, K inputs.
"""

import contextlib
import ctypes
import functools
import logging
import mmap
import os
from collections.abc import Callable
from typing import Any

import torch  # before the library is loaded: both then share torch's OpenMP threads
from torch import Tensor

from tinyllm.errors import TinyllmError
from tinyllm.ops import build, int4

ISAS = ("scalar", "avx2", "avx512vnni", "avx512bf16")
"""Instruction sets, slowest first; the position is the number that the library knows."""
ALIGNMENT = 64
LARGE_PAGE = 1 << 21
LANES, GROUP = 16, 4
"""A packed block has 16 outputs side by side, each with 4 inputs together; kernels/LAYOUT.md."""


class _Weight(ctypes.Structure):
    """`tinyllm::Weight` of kernels/cpu/w8a8.h."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("isa", ctypes.c_int64),
        ("bits", ctypes.c_int64),
    )


@functools.cache
def load() -> tuple[Any, str]:
    """Return the library, built if need be, and where it came from; or None and why there is none.

    The first failure is logged in one line, since a fallback must be visible.
    """
    try:
        path = build.build()
        library = ctypes.CDLL(str(path))
    except (build.BuildError, OSError) as error:
        reason = " ".join(str(error).split())
        logging.getLogger("tinyllm.ops").warning("no native CPU kernels, using torch: %s", reason)
        return None, reason
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.tinyllm_isa_supported.argtypes = (integer,)
    library.tinyllm_pack_w8.argtypes = (pointer, integer, integer, pointer, pointer)
    library.tinyllm_quantize_rows.argtypes = (
        *(pointer, integer, integer, pointer, pointer),
        *(integer, integer),
    )
    library.tinyllm_pack_w4.argtypes = (pointer, pointer, integer, integer, pointer)
    library.tinyllm_linear.argtypes = (pointer, pointer, integer, pointer, integer)
    library.tinyllm_decode.argtypes = (pointer, pointer, integer)
    library.tinyllm_adamw8bit.argtypes = (pointer, integer, integer)
    library.tinyllm_cross_entropy.argtypes = (pointer, integer)
    library.tinyllm_flash_forward.argtypes = (pointer, integer)
    library.tinyllm_flash_backward.argtypes = (pointer, integer)
    return library, path.name


def best_isa() -> int:
    """Return the number of the instruction set to use: `TINYLLM_CPU_ISA`, else the best one here.

    Raises:
        TinyllmError: the variable names an unknown one, or one that this processor lacks.
    """
    library, _ = load()
    here = [name for i, name in enumerate(ISAS) if library.tinyllm_isa_supported(i)]
    wanted = os.environ.get("TINYLLM_CPU_ISA", here[-1])
    if wanted not in here:
        raise TinyllmError(
            f"TINYLLM_CPU_ISA: {wanted!r} cannot run here; use {' or '.join(here)}, or unset it"
        )
    return ISAS.index(wanted)


def refuses(device: torch.device) -> str | None:
    """Return why this backend cannot serve a device, None if it can; builds the library."""
    if device.type != "cpu":
        return f"the tensors are on {device.type}"
    library, reason = load()
    return None if library is not None else reason


def given_threads() -> int | None:
    """Return how many threads `TINYLLM_THREADS` allows, None where it says nothing."""
    given = os.environ.get("TINYLLM_THREADS", "")
    if given and not (given.isdecimal() and int(given) > 0):
        raise TinyllmError(f"TINYLLM_THREADS: {given!r} is not a number of threads")
    return int(given) if given else None


def n_threads() -> int:
    """Return how many threads a call may use: `TINYLLM_THREADS`, else torch's."""
    return given_threads() or torch.get_num_threads()


def quantize_per_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `reference.quantize_per_row` does."""
    x = x.float().contiguous()
    q = torch.empty(x.shape, dtype=torch.int8)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32)
    k = x.shape[-1]
    arguments = (x.data_ptr(), scale.numel(), k, q.data_ptr(), scale.data_ptr())
    check(load()[0].tinyllm_quantize_rows(*arguments, best_isa(), n_threads()))
    return q, scale


def bind_linear_w8a8(weight_q: Tensor, weight_scale: Tensor) -> Callable[[Tensor], Tensor]:
    """Pack a weight; return what `reference.bind_linear_w8a8` returns, equal in every bit."""
    return PackedLinear(weight_q, weight_scale)


def bind_linear_w4a8(weight_q: Tensor, weight_scale: Tensor) -> Callable[[Tensor], Tensor]:
    """Pack a weight; return what `reference.bind_linear_w4a8` returns, equal in every bit."""
    return PackedLinear(weight_q, weight_scale)


class PackedLinear:
    """A packed weight that can be called; everything that can be done once is done here."""

    __slots__ = ("_k", "_keep", "_n", "_run", "_threads", "address")

    address: int
    """Of the `tinyllm::Weight`, for native code that calls the layer itself."""

    def __init__(
        self, weight_q: Tensor, weight_scale: Tensor, arena: "Arena | None" = None
    ) -> None:
        """Pack a weight, INT8 or (in uint8) 4-bit, into a model's arena if it has one."""
        (n, columns), bits = weight_q.shape, bits_of(weight_q)
        k = columns * 8 // bits
        n_bytes = packed_bytes(n, k, bits)
        packed = aligned_empty(n_bytes) if arena is None else arena.take(n_bytes)
        pack = _pack_w4 if bits == 4 else _pack_w8
        rest = pack(weight_q.contiguous(), weight_scale, packed)  # what lies beside the numbers
        addresses = (x.data_ptr() for x in (packed, *rest)) if rest else (packed.data_ptr(), 0, 0)
        weight = _Weight(*addresses, n, k, best_isa(), bits)
        self._keep = (packed, *rest, weight)  # the library holds bare addresses
        self.address = ctypes.addressof(weight)
        self._n, self._k, self._threads = n, k, n_threads()
        self._run = load()[0].tinyllm_linear

    def __call__(self, x: Tensor) -> Tensor:
        """Return the layer's output, (..., N) in x's dtype, for x of shape (..., K)."""
        if x.dtype is not torch.float32:
            return self(x.float()).to(x.dtype)
        shape = x.shape
        if shape[-1] != self._k:
            raise ValueError(f"x has {shape[-1]} inputs, the weight has {self._k}")
        if not x.is_contiguous():
            x = x.contiguous()
        y = torch.empty((*shape[:-1], self._n))
        rows = x.numel() // self._k
        check(self._run(self.address, x.data_ptr(), rows, y.data_ptr(), self._threads))
        return y


def _pack_w8(rows: Tensor, row_scale: Tensor, packed: Tensor) -> tuple[Tensor, ...]:
    """Write INT8 rows into `packed`; return their offsets and scales, padded."""
    n, k = rows.shape
    padded_n = -(-n // LANES) * LANES
    offset, scale = torch.empty(padded_n, dtype=torch.int32), torch.zeros(padded_n)
    scale[:n] = row_scale
    arguments = (rows.data_ptr(), n, k, packed.data_ptr(), offset.data_ptr())
    check(load()[0].tinyllm_pack_w8(*arguments))
    return offset, scale


def _pack_w4(rows: Tensor, scale: Tensor, packed: Tensor) -> tuple[Tensor, ...]:
    """Write 4-bit rows and their scales into `packed`; nothing else remains."""
    n, k = rows.shape[0], 2 * rows.shape[1]
    scale = scale.contiguous()
    arguments = (rows.data_ptr(), scale.data_ptr(), n, k, packed.data_ptr())
    check(load()[0].tinyllm_pack_w4(*arguments))
    return ()


def bits_of(weight_q: Tensor) -> int:
    """Return the bits of a stored weight: two of 4 share a byte of uint8, 8 are int8."""
    return 4 if weight_q.dtype is torch.uint8 else 8


def packed_bytes(n: int, k: int, bits: int) -> int:
    """Return what N x K weights take when they are packed: a multiple of 64."""
    steps = -(-k // GROUP)
    if bits == 8:
        return -(-n // LANES) * LANES * steps * GROUP
    return -(-n // (2 * LANES)) * LANES * GROUP * (steps + -(-k // int4.GROUP))


class Arena:
    """Memory for all weights of a model, one behind the other, in large pages where they exist.

    A page of 4 KB holds 64 lines: with small ones the processor looks up an address every 0.1 us.
    Asked of the system itself: the C library may hand out what a freed tensor left, in pages that
    are small and stay so.
    """

    def __init__(self, n_bytes: int) -> None:
        pages = mmap.mmap(-1, n_bytes + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without them: small pages
                pages.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(pages, dtype=torch.int8)
        start = -memory.data_ptr() % LARGE_PAGE
        self._rest = memory[start : start + n_bytes]

    def take(self, n_bytes: int) -> Tensor:
        """Return the next piece."""
        piece, self._rest = self._rest[:n_bytes], self._rest[n_bytes:]
        return piece


def aligned_empty(n_bytes: int) -> Tensor:
    """Return uninitialised INT8 memory that starts on a cache line."""
    memory = torch.empty(n_bytes + ALIGNMENT, dtype=torch.int8)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + n_bytes]


def check(code: int) -> None:
    """Raise where the library refused its arguments, which is a mistake of the caller above."""
    if code:
        raise RuntimeError(f"native kernel refused its arguments (code {code})")
