"""Runs a Launch on the CPU: the .cu file compiled by g++ against kernels/emu."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tinyllm.ops import build
from tinyllm.ops.launch import TENSOR_MAP_BYTES, Launch

KERNELS = Path(__file__).parents[2] / "kernels"
FLAGS = (
    *("-x", "c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-w"),
    "-U_FORTIFY_SOURCE",  # it takes a jump between two fibers' stacks for an attack
    *("-ffp-contract=off", "-fno-strict-aliasing", "-DTINYLLM_EMU"),
)
MESSAGE_BYTES = 500


class Map(ctypes.Structure):
    """`emu::Map` of kernels/emu/mbarrier.h, in the place of what a driver writes."""

    _fields_ = (
        ("address", ctypes.c_uint64),
        ("sizes", ctypes.c_uint64 * 4),
        ("strides", ctypes.c_uint64 * 3),
        ("rows", ctypes.c_uint32),
    )


class EmulatorError(Exception):
    """The kernel did something that no card forgives; the message says what and where."""


def run(launch: Launch, seed: int = 0, edits: tuple[tuple[str, str, str], ...] = ()) -> int:
    """Run a launch whose pointers are CPU tensors' `data_ptr()`; return its bank conflicts.

    Args:
        launch: what to run.
        seed: of the order of blocks, warps and lanes; 0, 1, 2 differ in how often warps take turns.
        edits: (file, old, new): texts to replace in kernels/cuda first, each exactly once.

    Raises:
        EmulatorError: a deadlock, an address out of bounds or not aligned, a bad launch.
    """
    library = ctypes.CDLL(str(compile_source(launch.source, launch.defines, edits)))
    entry = getattr(library, launch.entry)
    extents = (ctypes.c_uint * 6)(*launch.grid, *launch.block)
    for i, tensor in enumerate(launch.tensors):
        map_ = Map(tensor.address, tensor.sizes, tensor.strides, tensor.rows)
        to = ctypes.addressof(launch.arguments) + i * TENSOR_MAP_BYTES
        ctypes.memmove(to, ctypes.byref(map_), ctypes.sizeof(map_))
    message = ctypes.create_string_buffer(MESSAGE_BYTES)
    failed = entry(
        ctypes.byref(launch.arguments),
        extents,
        ctypes.c_uint(launch.shared_bytes),
        ctypes.c_ulonglong(seed),
        message,
        ctypes.c_ulonglong(MESSAGE_BYTES),
    )
    if failed:
        raise EmulatorError(f"{launch.source}, {launch.entry}: {message.value.decode()}")
    library.emu_bank_conflicts.restype = ctypes.c_ulonglong
    return library.emu_bank_conflicts()


@functools.cache
def compile_source(
    source: str, defines: tuple[str, ...], edits: tuple[tuple[str, str, str], ...] = ()
) -> Path:
    """Return the shared library of one .cu file, from the user's cache if it is there."""
    cxx = str(build.compiler())
    digest = hashlib.sha256(repr((source, defines, edits, FLAGS, _version(cxx))).encode())
    for file in sorted((KERNELS / "cuda" / source, *KERNELS.glob("[ce]*u*/*.h"))):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    target = build.cache_directory() / f"emu-{digest.hexdigest()[:24]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _compile(cxx, Path(folder), source, defines, edits).replace(target)
    return target


def _compile(cxx, folder, source, defines, edits):
    for name in ("cuda", "emu"):
        shutil.copytree(KERNELS / name, folder / name)
    for file, old, new in edits:
        text = (folder / "cuda" / file).read_text()
        assert text.count(old) == 1, f"{file}: {text.count(old)} times {old!r}"
        (folder / "cuda" / file).write_text(text.replace(old, new))
    macros = [f"-D{define}" for define in defines]
    out = folder / "kernel.so"
    command = [
        cxx,
        *FLAGS,
        f"-I{folder / 'cuda'}",
        *macros,
        str(folder / "cuda" / source),
        "-o",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise EmulatorError(f"{source} {defines}: {done.stderr[:2000]}")
    return out


@functools.cache
def _version(cxx: str) -> str:
    return subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
