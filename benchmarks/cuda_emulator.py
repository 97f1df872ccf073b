"""What the emulator has tested: kernels x shapes x orders of the warps, and mutants caught.

    python benchmarks/cuda_emulator.py [options of pytest]

Runs tests/cuda but for the gates, and counts what passing tests launch. Needs no GPU. Both tables
go into docs/cuda.md; `-m 'not gpu'` adds the slow tests.
"""

import ctypes
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tinyllm.ops import cuda_build
from tinyllm.ops.launch import Launch

TESTS = Path(__file__).parent.parent / "tests" / "cuda"
MUTANT = "test_a_fault_is_noticed"
"""The tests of one mutant each, their parameter `mutant`."""


@dataclass(kw_only=True, slots=True)
class Kernel:
    """What one kernel went through."""

    shapes: set[tuple[object, ...]] = field(default_factory=set)
    """Different programs, grids and sizes."""
    seeds: set[int] = field(default_factory=set)
    """Of the scheduler."""
    runs: int = 0
    """Launches."""
    seconds: float = 0.0
    """Of all launches; compiling a program for the first time is among them."""


class Watch:
    """A plugin of pytest that looks on."""

    def __init__(self) -> None:
        self.kernels: dict[str, Kernel] = {}
        self.mutants: dict[str, str] = {}
        """The file that each changes, by the id of its test."""
        self.caught: Counter[str] = Counter()
        """By file."""
        self._launches: list[tuple[Launch, int, float]] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Count the mutants; come between the tests and the emulator, which they know by now."""
        items: list[Any] = session.items
        for item in items:
            if item.originalname == MUTANT:
                self.mutants[item.nodeid] = item.callspec.params["mutant"].file
        emulator: Any = sys.modules["emulator"]
        run = emulator.run

        def watched(launch: Launch, seed: int = 0, edits: tuple[Any, ...] = ()) -> Any:
            started_s = time.perf_counter()
            result = run(launch, seed, edits)
            self._launches.append((launch, seed, time.perf_counter() - started_s))
            return result

        emulator.run = watched

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count what a test did, if it passed."""
        if report.when == "call" and report.passed:
            if file := self.mutants.get(report.nodeid):
                self.caught[file] += 1
            else:
                for one in self._launches:
                    self._count(*one)
        if report.when == "teardown":
            self._launches.clear()

    def _count(self, launch: Launch, seed: int, seconds: float) -> None:
        """Count a launch of a kernel that is ours to test."""
        if launch.source in cuda_build.sources():
            kernel = self.kernels.setdefault(launch.entry, Kernel())
            sizes = _sizes(launch.arguments, None)
            kernel.shapes.add((launch.defines, launch.grid, launch.block, *sizes))
            kernel.seeds.add(seed)
            kernel.runs, kernel.seconds = kernel.runs + 1, kernel.seconds + seconds


def _sizes(value: Any, kind: Any) -> list[object]:
    """Return all numbers in a kernel's arguments; of an address only whether there is one."""
    if isinstance(value, ctypes.Structure):
        fields = [(getattr(value, name), of) for name, of, *_ in value._fields_]
    elif isinstance(value, ctypes.Array) and value._type_ is ctypes.c_ubyte:
        return []  # maps for the copy engine: of addresses, and of sizes that stand elsewhere, too
    elif isinstance(value, ctypes.Array):
        fields = [(one, value._type_) for one in value]
    else:
        return [value is not None if kind is ctypes.c_void_p else value]
    return [number for field in fields for number in _sizes(*field)]


def main() -> int:
    """Run the tests and print the tables; return pytest's verdict."""
    watch = Watch()
    started_s = time.perf_counter()
    gates = f"--ignore={TESTS / 'test_gates.py'}"
    verdict = pytest.main([str(TESTS), gates, *sys.argv[1:]], plugins=[watch])
    print("\n| kernel | shapes | seeds | launches | seconds |\n|---|---|---|---|---|")
    for name, kernel in sorted(watch.kernels.items()):
        counts = f"{len(kernel.shapes)} | {len(kernel.seeds)} | {kernel.runs}"
        print(f"| `{name}` | {counts} | {kernel.seconds:.1f} |")
    print("\n| source | mutants caught / committed |\n|---|---|")
    for file, n in sorted(Counter(watch.mutants.values()).items()):
        print(f"| `{file}` | {watch.caught[file]} / {n} |")
    every = watch.kernels.values()
    print(
        f"\n{len(watch.kernels)} kernels, {sum(len(k.shapes) for k in every)} shapes,"
        f" {sum(k.runs for k in every)} launches passed; mutants caught {watch.caught.total()} /"
        f" {len(watch.mutants)}; {time.perf_counter() - started_s:.0f} s"
    )
    return int(verdict)


if __name__ == "__main__":
    sys.exit(main())
