"""What the compilers make of every CUDA kernel for every card: registers, shared memory, spills.

    python benchmarks/cuda_gates.py [--nvcc] [--all] [--card sm_86]

Needs no GPU: NVRTC and nvdisasm are packages of PyPI. The table goes into docs/cuda.md; the limits
and the expected instructions are held by tests/cuda/test_gates.py.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cuda_launches import FORMATS, launches

from tinyllm.ops import cuda_build
from tinyllm.ops.launch import Launch

KIB = 1024
SHARED_LIMITS = {"sm_80": 163 * KIB, "sm_86": 99 * KIB, "sm_89": 99 * KIB, "sm_90": 227 * KIB}
"""Shared memory that a block may ask for, CUDA C++ Programming Guide, table of capabilities."""
FILE_REGISTERS, THREAD_REGISTERS = 64 * KIB, 255
"""Of a multiprocessor, which must hold a block; of a thread."""
INSTRUCTIONS = {
    "HMMA": r"\bHMMA\.",  # tensor cores, bf16 and fp16
    "HGMMA": r"\bHGMMA\.",  # the same of a warpgroup (wgmma)
    "UTMALDG": r"\bUTMALDG\b",  # boxes by the copy engine (TMA)
    "IMMA": r"\bIMMA\.",  # tensor cores, INT8
    "LDG.128": r"\bLDG\.E\S*\.128\b",  # 16 bytes from global memory
    "STG.128": r"\bSTG\.E\S*\.128\b",
    "LDGSTS.128": r"\bLDGSTS\.E\S*\.128\b",  # cp.async, past the registers
    "LDSM": r"\bLDSM\.",  # ldmatrix
    "local": r"\b(?:LDL|STL)\b",  # registers that lie in memory
}
"""What is looked for in the machine code."""
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_SERIALIZED = re.compile(r"wgmma\S* instructions are serialized .* function '(\w+)'")
_USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")

Program = tuple[str, tuple[str, ...]]
"""A source and its macros."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """A kernel of a program on one kind of card."""

    registers: int
    """Per thread."""
    spill_bytes: int
    """Written to and read from memory for want of registers."""
    static_shared_bytes: int
    """Shared memory beside what the launch asks for."""
    is_serialized: bool = False
    """Whether its wgmma wait for each other, as ptxas warns."""
    instructions: Mapping[str, int]
    """How often those of `INSTRUCTIONS` occur; empty without nvdisasm."""


def programs(recorded: Iterable[Launch]) -> dict[Program, dict[str, list[Launch]]]:
    """Return the launches of each program by kernel."""
    found: dict[Program, dict[str, list[Launch]]] = {}
    for launch in recorded:
        kernels = found.setdefault((launch.source, launch.defines), {})
        kernels.setdefault(launch.entry, []).append(launch)
    return found


def inspect(
    compiler: cuda_build.Compiler, program: Program, architecture: str
) -> dict[str, Kernel]:
    """Compile a program; return its kernels by name.

    Raises:
        BuildError: it does not compile.
    """
    source, defines = program
    told = cuda_build.options(source, defines)
    wanted = cuda_build.compiled_for(source, architecture)
    compiled = compiler.compile(cuda_build.SOURCES / source, told, wanted)
    code = machine_code(compiled.cubin)
    serialized = set(_SERIALIZED.findall(compiled.log))
    kernels = {}
    for name, text in _by_entry(compiled.log).items():
        spills, used = _SPILLS.search(text), _USED.search(text)
        if spills is None or used is None:
            raise ValueError(f"{source}, {name}: ptxas does not tell what it uses: {text}")
        counts = {
            kind: len(re.findall(pattern, code[name])) if name in code else 0
            for kind, pattern in INSTRUCTIONS.items()
        }
        kernels[name] = Kernel(
            registers=int(used[1]),
            spill_bytes=int(spills[1]) + int(spills[2]),
            static_shared_bytes=int(used[2] or 0),
            is_serialized=name in serialized,
            instructions={kind: n for kind, n in counts.items() if n},
        )
    return kernels


def inspect_all(
    compiler: cuda_build.Compiler, wanted: Sequence[tuple[Program, str]]
) -> dict[tuple[Program, str], dict[str, Kernel]]:
    """Do `inspect` for programs with their architectures, as many at once as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = pool.map(lambda one: inspect(compiler, *one), wanted)
        return dict(zip(wanted, kernels, strict=True))


def machine_code(cubin: bytes) -> dict[str, str]:
    """Return the instructions of each kernel as text; none where nvdisasm is not installed."""
    try:
        from cuda.pathfinder import find_nvidia_binary_utility

        nvdisasm = find_nvidia_binary_utility("nvdisasm")
    except ImportError:
        nvdisasm = None
    if nvdisasm is None:
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [nvdisasm, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, *sections = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)
    return dict(zip(sections[::2], sections[1::2], strict=True))


def faults(kernel: Kernel, recorded: Sequence[Launch], architecture: str) -> list[str]:
    """Return what a card of an architecture, or a reader, would object to."""
    found = []
    if kernel.spill_bytes:
        found.append(f"spills {kernel.spill_bytes} bytes")
    if kernel.instructions.get("local"):
        found.append(f"{kernel.instructions['local']} accesses to local memory")
    if kernel.is_serialized:
        found.append("its wgmma wait for each other")
    if kernel.registers > THREAD_REGISTERS:
        found.append(f"{kernel.registers} registers per thread")
    for launch in recorded:
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        needed = -(-kernel.registers // 8) * 8 * threads
        if needed > FILE_REGISTERS:
            found.append(f"{needed} registers for {threads} threads")
        shared = launch.shared_bytes + kernel.static_shared_bytes
        if shared > SHARED_LIMITS[architecture]:
            found.append(f"{shared} bytes of shared memory")
    return found


def _by_entry(log: str) -> dict[str, str]:
    """Return what ptxas says about each kernel."""
    _, *parts = _ENTRY.split(log)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def table(
    by_card: Mapping[str, Mapping[Program, Mapping[str, Sequence[Launch]]]],
    inspected: Mapping[tuple[Program, str], Mapping[str, Kernel]],
) -> Iterator[str]:
    """Yield a table in Markdown: a line per kernel, registers per thread by architecture.

    Args:
        by_card: launches by architecture, program and kernel.
        inspected: kernels by program and architecture.
    """
    head = ["kernel", "macros", *by_card, "shared KiB", "spills", "instructions"]
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for program in dict.fromkeys(program for found in by_card.values() for program in found):
        cards = [name for name in by_card if program in by_card[name]]
        for entry, recorded in by_card[cards[0]][program].items():
            of_card = {
                name: inspected[program, name][entry] if name in cards else None for name in by_card
            }
            yield _line(entry, program, recorded, of_card)


def _line(
    entry: str,
    program: Program,
    recorded: Sequence[Launch],
    of_card: Mapping[str, Kernel | None],
) -> str:
    """Return the line of a kernel; `of_card`: None for those that do not use the program."""
    kernels = [kernel for kernel in of_card.values() if kernel is not None]
    shared = max(launch.shared_bytes for launch in recorded) + kernels[0].static_shared_bytes
    cells = [
        *(f"`{entry}`", " ".join(define.removeprefix("FORMAT=") for define in program[1])),
        *("-" if kernel is None else str(kernel.registers) for kernel in of_card.values()),
        *(f"{shared / KIB:.1f}", str(sum(kernel.spill_bytes for kernel in kernels))),
        ", ".join(f"{n} {kind}" for kind, n in kernels[0].instructions.items()) or "-",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Print the table; return 1 if a card would object to a kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--nvcc", action="store_true", help="compile by nvcc instead of NVRTC")
    parser.add_argument("--all", action="store_true", help="fp16 and fp32, too")
    parser.add_argument("--card", choices=cuda_build.ARCHITECTURES, help="one architecture only")
    options = parser.parse_args()
    compiler = cuda_build.nvcc() if options.nvcc else cuda_build.nvrtc()
    started_s = time.perf_counter()
    cards = (options.card,) if options.card else cuda_build.ARCHITECTURES
    formats = FORMATS if options.all else FORMATS[:1]
    by_card = {name: programs(launches(name, formats)) for name in cards}
    wanted = [(program, name) for name, found in by_card.items() for program in found]
    inspected = inspect_all(compiler, wanted)
    print(f"{compiler.name}; registers per thread; instructions of the first card\n")
    print(*table(by_card, inspected), sep="\n")
    wrong = [
        f"{entry} {' '.join(program[1])} on {name}: {fault}"
        for program, name in wanted
        for entry, recorded in by_card[name][program].items()
        for fault in faults(inspected[program, name][entry], recorded, name)
    ]
    n_kernels = sum(len(kernels) for kernels in inspected.values())
    spilt = sum(k.spill_bytes for kernels in inspected.values() for k in kernels.values())
    seconds = time.perf_counter() - started_s
    print(f"\n{len(wanted)} programs, {n_kernels} kernels on {', '.join(cards)}, {seconds:.0f} s:")
    print(*(wrong or [f"all fit, {spilt} bytes are spilt"]), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
