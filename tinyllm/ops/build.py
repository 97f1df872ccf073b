"""Builds our C++ with the compiler of the machine, once per source, flags and compiler.

The library goes into the user's cache (`TINYLLM_CACHE`, else `XDG_CACHE_HOME/tinyllm`, else
`~/.cache/tinyllm`), never into a DVC output: one built for another processor would come back
without a word. `python -m tinyllm.ops.build` builds ahead of the first use.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "kernels" / "cpu"
COMMON = (
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-Wall", "-Wextra"),
    # Contracting a * b + c into one rounding would break equality with the reference.
    *("-ffp-contract=off", "-fno-math-errno"),
    "-Wno-psabi",  # 64-byte vectors as arguments, all inlined
)
AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC 12 warns about its own header
)
FMA = ("-mfma", "-ffp-contract=fast")  # compared within a tolerance, not bit by bit
UNITS: dict[str, tuple[str, ...]] = {
    "w8a8.cpp": (),
    "pool.cpp": ("-std=c++20", "-pthread"),
    "decoder.cpp": (),
    "w8a8_scalar.cpp": (),
    "w8a8_avx2.cpp": ("-mavx2",),
    "w8a8_avx512vnni.cpp": (*AVX512, "-mavx512vnni"),
    "adamw8bit.cpp": (),
    "adamw8bit_avx512.cpp": AVX512,
    "flash.cpp": (),
    "flash_avx2.cpp": ("-mavx2", *FMA),
    "flash_avx512.cpp": (*AVX512, *FMA),
    "cross_entropy.cpp": (),
    "cross_entropy_avx2.cpp": ("-mavx2", *FMA),
    "cross_entropy_avx512.cpp": (*AVX512, *FMA),
    "flash_avx512bf16.cpp": (*AVX512, "-mavx512bf16", *FMA),
}
"""Translation units and the flags that only they get; the rest must run on any x86-64."""
COMPILE_TIMEOUT_S = 300


class BuildError(Exception):
    """The library cannot be built here; the message is the reason, in one line."""


def obstacle() -> str | None:
    """Return why this machine cannot build, None if it should; never compiles, prints or raises."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"the processor is {platform.machine() or 'unknown'}, not x86-64"
    if os.name != "posix":
        return f"the system is {platform.system()}, building is known for Linux and macOS"
    if not SOURCES.is_dir():
        return "the C++ sources are not installed (folder kernels/cpu)"
    if compiler() is None:
        return "no C++ compiler found (g++, or the variable CXX)"
    return None


def compiler() -> str | None:
    """Return the path of the compiler: `CXX`, else g++, c++ or clang++, whichever comes first."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def library_path() -> Path:
    """Return where the library of these sources, flags and compiler lies once it is built.

    Raises:
        BuildError: there is an `obstacle`, or the compiler does not run.
    """
    if reason := obstacle():
        raise BuildError(reason)
    cxx = str(compiler())
    digest = hashlib.sha256(repr((_version(cxx), COMMON, UNITS)).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".h", ".cpp"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return cache_directory() / f"cpu-{digest.hexdigest()[:24]}.so"


def cache_directory() -> Path:
    """Return the folder of built libraries."""
    if given := os.environ.get("TINYLLM_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tinyllm"


def build() -> Path:
    """Return the path of the library, compiling it if no one has; processes wait for each other.

    Raises:
        BuildError: there is an `obstacle`, the compiler fails, or the cache cannot be written.
    """
    target = library_path()
    build_once(target, _compile)
    return target


def build_once(target: Path, make: Callable[[Path], None]) -> None:
    """Make a file of the cache unless it is there; processes wait for each other.

    Args:
        target: what is wanted.
        make: puts it into place as a whole, by a temporary file.

    Raises:
        BuildError: `make` fails, or the cache cannot be written.
    """
    if target.exists():
        return
    import fcntl  # absent on systems that `obstacle` refuses

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                make(target)
    except OSError as error:
        raise BuildError(f"{error.filename or target}: {error.strerror}") from None


def _compile(target: Path) -> None:
    """Compile every unit, link them and put the library in place."""
    temporary = target.with_name(f"{target.stem}.{os.getpid()}.tmp")
    temporary.mkdir(exist_ok=True)
    cxx = str(compiler())
    try:
        objects = [str(temporary / f"{name}.o") for name in UNITS]
        commands = [
            [cxx, *COMMON, *flags, "-c", str(SOURCES / name), "-o", out]
            for (name, flags), out in zip(UNITS.items(), objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(run_command, commands))
        linked = temporary / target.name
        run_command([cxx, "-shared", "-fopenmp", "-pthread", *objects, "-o", str(linked)])
        if library_path() != target:
            raise BuildError("the C++ sources changed while they were compiled; try again")
        linked.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _version(cxx: str) -> str:
    """Return what the compiler says about itself."""
    return run_command([cxx, "--version"])


def run_command(command: list[str]) -> str:
    """Return what a compiler's command prints.

    Raises:
        BuildError: it fails; the message is its first line of error.
    """
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{name} does not run: {' '.join(str(error).split())}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise BuildError(f"{name} failed: {lines[0].strip()}")
    return done.stdout + done.stderr


def main() -> int:
    """Build ahead of the first use; tell where, or why not."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log = logging.getLogger("tinyllm.ops")
    try:
        log.info("built %s", build())
    except BuildError as error:
        log.error("not built: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
