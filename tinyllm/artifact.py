"""Directories that know what they hold and what they were made from.

Every output directory has a `manifest.json`: the SHA-256 of each file, the digests of all
ancestors by kind, the resolved configuration. Two inputs that disagree about a common ancestor are
refused: that is the lineage guard. A directory appears whole or not at all.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from tinyllm.errors import ArtifactError, LineageError
from tinyllm.params import to_plain

MANIFEST = "manifest.json"
FORMAT = 1
_VERSIONED = ("torch", "tokenizers", "pyarrow", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a directory holds and where it comes from."""

    kind: str
    """The role in the pipeline: raw, clean, tokenizer, tokens, pretrain, ..."""
    files: Mapping[str, str]
    """SHA-256 of each file by its path relative to the directory, with `/`."""
    lineage: Mapping[str, str]
    """Digest of every ancestor by its kind."""
    config: Mapping[str, Any]
    """The resolved parameters that shaped it."""
    info: Mapping[str, Any]
    """Counts and facts about the content, as its maker tells them."""

    @property
    def digest(self) -> str:
        """SHA-256 over everything above: equal digests mean equal bytes with equal ancestry."""
        return digest_json(to_plain(self))


@dataclass(slots=True)
class Draft:
    """An artifact that is being written."""

    path: Path
    """The folder to write into; it becomes the artifact when the block ends without an error."""
    info: dict[str, Any] = field(default_factory=dict)
    """Facts for the manifest: JSON values, no times, no absolute paths."""


@contextmanager
def build_artifact(
    directory: Path,
    *,
    kind: str,
    made_from: Sequence[Path],
    config: Any = None,
    copies: Mapping[str, Path] | None = None,
) -> Iterator[Draft]:
    """Write an artifact: files go to a folder beside it, which takes its place when the block ends.

    Args:
        directory: where the artifact will stand; an older one there is replaced.
        kind: its role, unique in the pipeline.
        made_from: the artifacts it is made from.
        config: a dataclass or mapping of what shaped it.
        copies: files to copy in, by name in the artifact.

    Raises:
        LineageError: the inputs come from different ancestors.
        ArtifactError: an input has no readable manifest.
    """
    lineage = merge_lineage(made_from)
    temporary = directory.with_name(f"{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, source in (copies or {}).items():
            shutil.copyfile(source, temporary / name)
        draft = Draft(temporary)
        yield draft
        files = {name: file_sha256(temporary / name) for name in list_files(temporary)}
        manifest = Manifest(
            kind=kind,
            files=files,
            lineage=lineage,
            config=to_plain(config or {}),
            info=to_plain(draft.info),
        )
        document = {
            "format": FORMAT,
            "digest": manifest.digest,
            **to_plain(manifest),
            "versions": _versions(),
        }
        write_json(temporary / MANIFEST, document)
        replace_directory(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_manifest(directory: Path, *kinds: str) -> Manifest:
    """Read the manifest of an artifact without reading its files.

    Args:
        directory: the artifact.
        kinds: the kinds that will do; none given means any.

    Raises:
        ArtifactError: no manifest, a damaged one, or another kind.
    """
    path = directory / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        digest, fields = document["digest"], ("kind", "files", "lineage", "config", "info")
        manifest = Manifest(**{name: document[name] for name in fields})
    except FileNotFoundError:
        raise ArtifactError(
            f"{directory}: no {MANIFEST} here; build it with `dvc repro` or name another folder"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(
            f"{path}: damaged; rebuild the folder with `dvc repro --force`"
        ) from None
    if manifest.digest != digest:
        raise ArtifactError(
            f"{path}: does not match its own digest; rebuild the folder with `dvc repro --force`"
        )
    if kinds and manifest.kind not in kinds:
        raise ArtifactError(
            f"{directory}: holds a {manifest.kind!r} artifact,"
            f" {' or '.join(map(repr, kinds))} expected"
        )
    return manifest


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Read every file of an artifact and compare it with the manifest.

    Raises:
        ArtifactError: a file is missing, changed or not listed; the first one is named.
    """
    found = set(list_files(directory))
    for name, expected in manifest.files.items():
        if name not in found:
            raise ArtifactError(f"{directory / name}: missing; rebuild the folder with `dvc repro`")
        if file_sha256(directory / name) != expected:
            raise ArtifactError(
                f"{directory / name}: differs from its manifest; rebuild it or run `dvc checkout`"
            )
    if extra := sorted(found - set(manifest.files)):
        raise ArtifactError(
            f"{directory / extra[0]}: not listed in {MANIFEST}; remove it or rebuild the folder"
        )


def merge_lineage(made_from: Sequence[Path]) -> dict[str, str]:
    """Return the digests of all ancestors of the given artifacts, by kind.

    Raises:
        LineageError: two of them name different digests for one kind.
    """
    merged: dict[str, tuple[str, Path]] = {}
    for directory in made_from:
        manifest = load_manifest(directory)
        for kind, digest in {**manifest.lineage, manifest.kind: manifest.digest}.items():
            known, where = merged.setdefault(kind, (digest, directory))
            if known != digest:
                raise LineageError(
                    f"{directory} and {where} do not belong together: {kind} {digest[:12]}"
                    f" against {known[:12]}; rebuild both with `dvc repro`"
                )
    return {kind: merged[kind][0] for kind in sorted(merged)}


def list_files(directory: Path) -> list[str]:
    """Return the relative paths of all files but the manifest, sorted, with `/`."""
    files = (
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    )
    return sorted(name for name in files if name != MANIFEST)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value in its canonical form."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value, sorted and indented, in place of what was there.

    In ASCII: DVC takes a short file of many other characters, such as a sample of a model that has
    learned nothing yet, for a binary one and fails.
    """
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file by way of a temporary one, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_directory(temporary: Path, directory: Path) -> None:
    """Put a finished folder in the place of an older one."""
    if directory.exists():
        old = directory.with_name(f"{directory.name}.{os.getpid()}.old.tmp")
        directory.rename(old)
        temporary.rename(directory)
        shutil.rmtree(old)
    else:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(directory)


def _versions() -> dict[str, str]:
    """Return the versions of the libraries that shape outputs; the digest leaves them out."""
    return {name: metadata.version(name) for name in _VERSIONED}
