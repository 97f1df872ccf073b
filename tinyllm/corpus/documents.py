"""Documents on disk: JSON lines `{"name", "text"}` in numbered shards, read as a stream.

The form is the same for raw and clean text. It knows nothing of where documents come from.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tinyllm.errors import DataError

SHARD_BYTES = 64_000_000
"""A shard is closed once it is this long."""


class Document(NamedTuple):
    """A text with a name."""

    name: str
    """`<source>/<path>`, for a row of a table `<source>/<path>#<row>`; unique in a corpus."""
    text: str
    """Any length; lines end with a newline character."""


def write_documents(
    directory: Path, documents: Iterable[Document], shard_bytes: int = SHARD_BYTES
) -> int:
    """Write documents to `documents-00000.jsonl` and following; return how many there were.

    Args:
        directory: made if absent; holds no documents yet.
        documents: in the order to keep.
        shard_bytes: a shard is closed once it is this long.
    """
    directory.mkdir(parents=True, exist_ok=True)
    n_documents, n_shards, shard = 0, 0, None
    try:
        for document in documents:
            if shard is None:
                shard = (directory / f"documents-{n_shards:05d}.jsonl").open("wb")
                n_shards += 1
            _write_line(shard, document)
            n_documents += 1
            if shard.tell() >= shard_bytes:
                shard.close()
                shard = None
    finally:
        if shard is not None:
            shard.close()
    return n_documents


def read_documents(directory: Path) -> Iterator[Document]:
    """Yield the documents of a folder in the order in which they were written.

    Raises:
        DataError: the folder has no documents, or a line is not a document.
    """
    shards = sorted(directory.glob("documents-*.jsonl"))
    if not shards:
        raise DataError(f"{directory}: no documents-*.jsonl here; build it with `dvc repro`")
    for shard in shards:
        with shard.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield _parse_line(line, f"{shard}:{number}")


def _write_line(shard: BinaryIO, document: Document) -> None:
    """Write one document; a lone surrogate has no UTF-8 form and becomes U+FFFD."""
    line = json.dumps(document._asdict(), ensure_ascii=False) + "\n"
    try:
        encoded = line.encode("utf-8")
    except UnicodeEncodeError:
        encoded = line.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")
    shard.write(encoded)


def _parse_line(line: bytes, where: str) -> Document:
    """Return the document of one line."""
    try:
        row = json.loads(line)
        name, text = row["name"], row["text"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{where}: not a document; rebuild with `dvc repro --force`") from None
    return Document(name, text)
