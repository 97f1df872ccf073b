"""Read the files of a source, archives too, as named streams; nothing is ever unpacked to disk.

An archive comes from outside and is not trusted: only plain files are read, links and devices are
passed over, paths are nothing but names, and sizes and counts have limits.
"""

import gzip
import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, cast

from tinyllm.corpus.documents import Document
from tinyllm.corpus.formats import read_format
from tinyllm.corpus.sources import FileSource, HuggingfaceSource, Source, label
from tinyllm.errors import SourceError

_ZIP = (".zip", ".whl")
_TAR = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
_GIB = 1 << 30
_SYMLINK = 0o120000
_DAMAGE = (
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    tarfile.TarError,
    lzma.LZMAError,
    zlib.error,
    EOFError,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What an archive may hold at most: a small file can unpack to more than the disk."""

    members: int
    """Entries of any kind."""
    member_bytes: int
    """Unpacked size of one file that is read."""
    total_bytes: int
    """Unpacked size of all entries together."""


LIMITS = Limits(members=1_000_000, member_bytes=_GIB, total_bytes=4 * _GIB)


class Member(NamedTuple):
    """A file of a source, open for reading."""

    name: str
    """Path inside the archive, or of the file itself below the fixed part of its pattern."""
    stream: BinaryIO
    """Open only until the next member is asked for."""


def extract(source: Source, files: Sequence[Path]) -> Iterator[Document]:
    """Yield the documents of a source by name, as its `format` says.

    Raises:
        SourceError: no member matches, an archive is corrupt or beyond the limits.
        DataError: a member is not of the format.
    """
    for member in open_members(source, files):
        with _corrupt_in_one_line(member.name):
            yield from read_format(source, member.name, member.stream)


def read_members(
    source: Source, files: Sequence[Path], limits: Limits = LIMITS
) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each member that matches, sorted by name within each file."""
    for member in open_members(source, files, limits):
        with _corrupt_in_one_line(member.name):
            content = member.stream.read()
        yield member.name, content


def open_members(
    source: Source, files: Sequence[Path], limits: Limits = LIMITS
) -> Iterator[Member]:
    """Yield the members that match `members`, sorted by name within each file.

    Args:
        source: gives the pattern.
        files: from `fetch`, in order.
        limits: of one archive.

    Raises:
        SourceError: no member matches, an archive is corrupt or beyond the limits.
    """
    pattern = re.compile(source.members or "")
    n_matches = 0
    seen: list[str] = []
    for path in files:
        for member in _open_file(path, _name(source, path), pattern, limits, seen):
            n_matches += 1
            yield member
    if not n_matches:
        inside = f"; inside are {', '.join(seen[:3])}, ..." if seen else "; the archive is empty"
        raise SourceError(f"{label(source)}: no file matches members {source.members!r}{inside}")


def _name(source: Source, path: Path) -> str:
    """Return a file's name on every machine: its path in the dataset, or below the pattern."""
    if isinstance(source, HuggingfaceSource):
        given = [name for name in source.files if path.as_posix().endswith(f"/{name}")]
        return max(given, key=len, default=path.name)
    if not isinstance(source, FileSource):
        return path.name
    fixed: list[str] = []
    for part in Path(source.path).expanduser().parts[:-1]:
        if any(character in part for character in "*?["):
            break
        fixed.append(part)
    return path.relative_to(Path(*fixed)).as_posix()


def _open_file(
    path: Path, name: str, pattern: re.Pattern[str], limits: Limits, seen: list[str]
) -> Iterator[Member]:
    """Yield the members of one file: the file itself if it is no archive."""
    lower = path.name.lower()
    with _corrupt_in_one_line(path.name):
        if lower.endswith(_ZIP):
            yield from _open_zip(path, pattern, limits, seen)
        elif lower.endswith(_TAR):
            yield from _open_tar(path, pattern, limits, seen)
        else:
            with gzip.open(path) if lower.endswith(".gz") else path.open("rb") as stream:
                yield Member(name, cast(BinaryIO, stream))


def _open_zip(
    path: Path, pattern: re.Pattern[str], limits: Limits, seen: list[str]
) -> Iterator[Member]:
    """Yield the matching files of a zip archive by name."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        _check_size(path, limits, len(entries), sum(entry.file_size for entry in entries))
        files = [entry for entry in entries if not entry.is_dir() and not _is_link(entry)]
        seen += [entry.filename for entry in files[:3]]
        for entry in sorted(files, key=lambda entry: entry.filename):
            if pattern.search(entry.filename):
                _check_member(path, entry.filename, entry.file_size, limits)
                try:
                    content = archive.read(entry)  # at most file_size bytes; compares the CRC
                except (RuntimeError, NotImplementedError) as error:  # encrypted, unknown method
                    raise SourceError(f"{path.name}: {error}; unpack it yourself") from None
                yield Member(_clean_name(entry.filename), io.BytesIO(content))


def _is_link(entry: zipfile.ZipInfo) -> bool:
    """Return whether an entry of a zip archive is a symbolic link, as Unix programs mark it."""
    return (entry.external_attr >> 16) & 0o170000 == _SYMLINK


def _open_tar(
    path: Path, pattern: re.Pattern[str], limits: Limits, seen: list[str]
) -> Iterator[Member]:
    """Yield the matching files of a tar archive by name, after one pass through it."""
    contents: list[tuple[str, bytes]] = []
    total_bytes = 0
    with tarfile.open(path, "r:*") as archive:
        for n_members, entry in enumerate(archive, start=1):
            total_bytes += entry.size
            _check_size(path, limits, n_members, total_bytes)
            if not entry.isreg():
                continue
            if len(seen) < 3:
                seen.append(entry.name)
            if pattern.search(entry.name):
                _check_member(path, entry.name, entry.size, limits)
                stream = archive.extractfile(entry)
                assert stream is not None  # it is a regular file
                contents.append((entry.name, stream.read()))
        _read_to_the_end(path, cast(BinaryIO, archive.fileobj), limits)
    for name, content in sorted(contents):
        yield Member(_clean_name(name), io.BytesIO(content))


def _read_to_the_end(path: Path, stream: BinaryIO, limits: Limits) -> None:
    """Read what follows the last entry of a tar archive: the compressor's checksum is there."""
    n_bytes = 0
    while chunk := stream.read(1 << 20):
        n_bytes += len(chunk)
        _check_size(path, limits, 0, n_bytes)


def _clean_name(name: str) -> str:
    """Return a member's path without the parts that lead elsewhere; it serves as a name only.

    >>> _clean_name("../../etc/passwd")
    'etc/passwd'
    """
    return "/".join(part for part in PurePosixPath(name).parts if part not in ("/", "..", "."))


def _check_size(path: Path, limits: Limits, n_members: int, total_bytes: int) -> None:
    """Refuse an archive with too many or too large entries."""
    if n_members > limits.members:
        raise SourceError(f"{path.name}: more than {limits.members:,} entries; unpack it yourself")
    if total_bytes > limits.total_bytes:
        raise SourceError(
            f"{path.name}: unpacks to more than {limits.total_bytes:,} bytes; unpack it yourself"
            " and use kind: file"
        )


def _check_member(path: Path, name: str, n_bytes: int, limits: Limits) -> None:
    """Refuse a member that is too large to be held in memory."""
    if n_bytes > limits.member_bytes:
        raise SourceError(
            f"{path.name}: {name} unpacks to {n_bytes:,} bytes, the limit is"
            f" {limits.member_bytes:,}; unpack it yourself and use kind: file"
        )


@contextmanager
def _corrupt_in_one_line(name: str) -> Iterator[None]:
    """Turn what the archive modules raise about a damaged file into one line."""
    try:
        yield
    except _DAMAGE as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"{name}: corrupt archive ({detail}); fetch it again") from None
