"""The fetched files of one source as documents on disk, counted."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tinyllm.artifact import digest_json, file_sha256, list_files
from tinyllm.corpus.documents import Document, write_documents
from tinyllm.corpus.extract import extract
from tinyllm.corpus.sources import Source, label
from tinyllm.errors import SourceError


def write_raw(
    directory: Path, name: str, source: Source, files: Sequence[Path], max_documents: int | None
) -> dict[str, Any]:
    """Write the documents of a source; return bytes, documents, files and a digest of it all.

    Args:
        directory: of this source.
        name: of the source; begins the documents' names.
        source: how to read the files.
        files: from `fetch`.
        max_documents: take the first so many; None: all.

    Raises:
        SourceError: there is no document, or an archive is damaged.
        DataError: a file is not of the format.
    """
    counts = {"bytes": 0, "documents": 0, "files": 0}
    documents = islice(extract(source, files), max_documents)
    if not write_documents(directory, _named_and_counted(name, documents, counts)):
        raise SourceError(f"{label(source)}: holds no documents; check format and members")
    digests = {file: file_sha256(directory / file) for file in list_files(directory)}
    return {**counts, "digest": digest_json(digests)}


def _named_and_counted(
    name: str, documents: Iterable[Document], counts: dict[str, int]
) -> Iterator[Document]:
    """Pass documents on with the source's name before theirs, counting them."""
    last = None
    for document in documents:
        file = document.name.partition("#")[0]
        counts["documents"] += 1
        counts["bytes"] += len(document.text.encode("utf-8", "replace"))
        counts["files"] += file != last
        last = file
        yield Document(f"{name}/{document.name}", document.text)
