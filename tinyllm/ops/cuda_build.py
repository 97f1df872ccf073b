"""Compiles our CUDA C++ for one kind of card, once per source, flags and compiler.

NVRTC does it, the compiler as a library: pip's torch for CUDA brings it, so nobody needs a CUDA
toolkit. Where it is missing, nvcc does, if there is one. Compiling needs no GPU; running is
`cuda_driver`'s work. Machine code goes into the same cache as the C++ of `build`.
"""

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllm.ops.build import BuildError, build_once, cache_directory, run_command

SOURCES = Path(__file__).parents[2] / "kernels" / "cuda"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")
"""A100; RTX 3060 and 3090; RTX 4090; H100 and H200. Others compile, too, but no test sees them."""
FLAGS = ("--std=c++17",)
HOPPER = frozenset({"attention_forward_hopper.cu"})
"""Sources with instructions that only sm_90 has, and no later card: compiled for "sm_90a"."""
EXACT = frozenset({"quantize.cu", "linear_w8a8.cu", "adamw8bit.cu"})
"""Sources that equal the reference in every bit: a * b + c is rounded twice, as it is there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """What a compiler makes of a source."""

    cubin: bytes
    """Machine code of one architecture, an ELF file."""
    log: str
    """Registers, shared memory and spills of each kernel, in the words of ptxas."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiler:
    """One of the two compilers."""

    name: str
    """With its version."""
    compile: Callable[[Path, Sequence[str], str], Compiled]
    """From a source, its options and an architecture such as "sm_86".

    Raises:
        BuildError: with the first line of error.
    """


def sources() -> list[str]:
    """Return the names of all sources."""
    return sorted(path.name for path in SOURCES.glob("*.cu"))


def options(source: str, defines: Sequence[str] = ()) -> list[str]:
    """Return what both compilers are told about a source and its macros, as in `Launch`."""
    exact = ["--fmad=false"] if source in EXACT else []
    return [*FLAGS, *exact, *(f"-D{define}" for define in defines)]


def compiled_for(source: str, architecture: str) -> str:
    """Return what a source is compiled for on a kind of card, such as "sm_86"."""
    return f"{architecture}a" if source in HOPPER else architecture


@functools.cache
def compiler() -> Compiler:
    """Return NVRTC, else nvcc.

    Raises:
        BuildError: there is neither.
    """
    try:
        return nvrtc()
    except BuildError as error:
        try:
            return nvcc()
        except BuildError as other:
            raise BuildError(f"{error}; {other}") from None


def cubin(source: str, defines: Sequence[str], architecture: str) -> Path:
    """Return the machine code of a program, compiled unless the cache has it.

    Args:
        source: a file of kernels/cuda.
        defines: its macros, as in `Launch`.
        architecture: such as "sm_86".

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be written.
    """
    chosen = compiler()
    told = options(source, defines)
    digest = hashlib.sha256(repr((chosen.name, architecture, source, told)).encode())
    for path in (*sorted(SOURCES.glob("*.h")), SOURCES / source):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    name = f"{Path(source).stem}-{architecture}-{digest.hexdigest()[:24]}.cubin"
    target = cache_directory() / name

    def make(target: Path) -> None:
        """Compile; the file appears whole or not at all."""
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        code = chosen.compile(SOURCES / source, told, compiled_for(source, architecture)).cubin
        temporary.write_bytes(code)
        temporary.replace(target)

    build_once(target, make)
    return target


def nvrtc() -> Compiler:
    """Return the compiler that is a library.

    Raises:
        BuildError: cuda-bindings or the library is not installed.
    """
    try:
        from cuda.bindings import nvrtc as library
        from cuda.pathfinder import find_nvidia_header_directory

        _, major, minor = library.nvrtcVersion()
        headers = find_nvidia_header_directory("cudart")
    except (ImportError, RuntimeError, OSError):
        raise BuildError("no NVRTC (pip install 'tinyllm-workshop[cuda]')") from None

    def compile_(source: Path, told: Sequence[str], architecture: str) -> Compiled:
        """Do what `Compiler.compile` tells."""
        include = [f"-I{folder}" for folder in (source.parent, headers) if folder]
        wanted = [f"--gpu-architecture={architecture}", "--ptxas-options=-v"]
        return _run_nvrtc(library, source, [*told, *include, *wanted])

    return Compiler(name=f"NVRTC {major}.{minor}", compile=compile_)


def nvcc() -> Compiler:
    """Return the compiler of a CUDA toolkit.

    Raises:
        BuildError: there is none on the path.
    """
    path = shutil.which("nvcc")
    if path is None:
        raise BuildError("no nvcc")
    version = run_command([path, "--version"]).partition("release ")[2].partition(",")[0]

    def compile_(source: Path, told: Sequence[str], architecture: str) -> Compiled:
        """Do what `Compiler.compile` tells."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.cubin"
            command = [path, "-cubin", f"-arch={architecture}", "--resource-usage"]
            log = run_command([*command, *told, str(source), "-o", str(out)])
            return Compiled(cubin=out.read_bytes(), log=log)

    return Compiler(name=f"nvcc {version}", compile=compile_)


def _run_nvrtc(library: Any, source: Path, told: Sequence[str]) -> Compiled:
    """Compile in this process; `library` is the module cuda.bindings.nvrtc."""

    def ask(name: str, *arguments: Any) -> Any:
        """Call the library; return what it returns behind its status."""
        result, *values = getattr(library, name)(*arguments)
        if int(result):
            raise BuildError(f"{name}: {library.nvrtcGetErrorString(result)[1].decode()}")
        return values[0] if values else None

    def read(name: str, *, n_bytes: int) -> bytes:
        """Return what the library writes into memory of that size."""
        memory = b" " * n_bytes  # NVRTC writes into it
        ask(name, program, memory)
        return memory

    text = source.read_bytes()
    program = ask("nvrtcCreateProgram", text, source.name.encode(), 0, [], [])
    try:
        (result,) = library.nvrtcCompileProgram(
            program, len(told), [option.encode() for option in told]
        )
        log = read("nvrtcGetProgramLog", n_bytes=ask("nvrtcGetProgramLogSize", program)).decode()
        if int(result):
            lines = [line for line in log.splitlines() if "error" in line] or ["no message"]
            raise BuildError(f"NVRTC failed: {lines[0].strip()}")
        size = ask("nvrtcGetCUBINSize", program)
        return Compiled(cubin=read("nvrtcGetCUBIN", n_bytes=size), log=log)
    finally:
        library.nvrtcDestroyProgram(program)
