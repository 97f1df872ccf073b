"""Documents to token shards: Arrow IPC files of one record batch, so the tokens lie in one piece.

    column    type                     one row per document
    name      string                   as in data/clean
    tokens    list<uint16 | uint32>    its ids, <|endoftext|> last
    n_bytes   int64                    UTF-8 bytes of its text

Not compressed: a shard is read by memory map, and a window of it is a view.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tinyllm.errors import DataError
from tinyllm.progress import Progress
from tinyllm.shards.reader import file_xxh3
from tinyllm.tokenizer.special import END_OF_TEXT
from tinyllm.tokenizer.tokenizer import Tokenizer

_MOST_SHARD_BYTES = 2**30  # Arrow counts the tokens of a list column in 31 bits
_GROUP_CHARACTERS = 4_000_000  # text in memory at once


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeParams:
    """The `encode` section."""

    shard_bytes: int
    """A shard is closed when its tokens take at least this many bytes."""

    def __post_init__(self) -> None:
        if not 1 <= self.shard_bytes <= _MOST_SHARD_BYTES:
            raise ValueError(
                f"shard_bytes: {self.shard_bytes} is not in 1..{_MOST_SHARD_BYTES};"
                " 16 to 128 MB work well"
            )


@dataclass(frozen=True, slots=True)
class _Row:
    """One encoded document."""

    name: str
    tokens: np.ndarray[Any, np.dtype[Any]]
    n_bytes: int


def write_tokens(
    splits: Mapping[str, Iterable[tuple[str, str]]],
    directory: Path,
    tokenizer: Tokenizer,
    tokenizer_digest: str,
    params: EncodeParams,
    progress: Progress,
) -> dict[str, Any]:
    """Write the shards of all splits.

    Args:
        splits: (name, text) of the documents in their final order, by split.
        directory: the artifact being written; shards go to `<directory>/<split>/`.
        tokenizer: what encodes.
        tokenizer_digest: of the tokenizer's manifest; each shard carries it.
        params: where shards end.
        progress: told per shard.

    Returns:
        the `info` of the manifest, which the reader needs.

    Raises:
        DataError: a split has no documents.
    """
    entries = {
        split: write_split(
            documents, directory, split, tokenizer, tokenizer_digest, params, progress
        )
        for split, documents in splits.items()
    }
    return {
        "splits": entries,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer_digest,
    }


def write_split(
    documents: Iterable[tuple[str, str]],
    directory: Path,
    split: str,
    tokenizer: Tokenizer,
    tokenizer_digest: str,
    params: EncodeParams,
    progress: Progress,
) -> dict[str, Any]:
    """Write the shards of one split and return their counts, sizes and hashes."""
    (directory / split).mkdir()
    shards: list[dict[str, Any]] = []
    for rows in _group_rows(_encode(documents, tokenizer), params.shard_bytes):
        file = f"{split}/shard-{len(shards):05d}.arrow"
        shards.append({"file": file, **_write_shard(directory / file, rows, tokenizer_digest)})
        progress.say(f"{file}: {shards[-1]['n_tokens']:,} tokens")
    if not shards:
        raise DataError(f"{split}: no documents to encode; give the {split} split some text")
    counts = ("n_documents", "n_tokens", "n_bytes")
    return {"shards": shards, **{name: sum(shard[name] for shard in shards) for name in counts}}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest type that holds every id.

    >>> token_dtype(65536), token_dtype(65537)
    (dtype('uint16'), dtype('uint32'))
    """
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _encode(documents: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> Iterator[_Row]:
    """Encode documents in groups, each on all cores."""
    end, dtype = tokenizer.id_of(END_OF_TEXT), token_dtype(tokenizer.vocab_size)
    for group in _groups(documents):
        all_ids = tokenizer.encode_batch([text for _, text in group])
        for (name, text), ids in zip(group, all_ids, strict=True):
            yield _Row(name, np.array([*ids, end], dtype=dtype), len(text.encode("utf-8")))


def _groups(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Yield documents in lists of a few megabytes."""
    group: list[tuple[str, str]] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document[1])
        if size >= _GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _group_rows(rows: Iterable[_Row], shard_bytes: int) -> Iterator[list[_Row]]:
    """Yield the rows of each shard."""
    shard: list[_Row] = []
    size = 0
    for row in rows:
        shard.append(row)
        size += row.tokens.nbytes
        if size >= shard_bytes:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _write_shard(path: Path, rows: list[_Row], tokenizer_digest: str) -> dict[str, Any]:
    """Write one shard and return its entry for the manifest."""
    borders = np.fromiter(
        chain([0], (len(row.tokens) for row in rows)), dtype=np.int64, count=len(rows) + 1
    ).cumsum()
    if borders[-1] >= 2**31:
        raise DataError(f"{path}: {borders[-1]} tokens do not fit in a shard; cut the documents")
    values = pa.array(np.concatenate([row.tokens for row in rows]))
    columns = {
        "name": pa.array([row.name for row in rows], pa.string()),
        "tokens": pa.ListArray.from_arrays(pa.array(borders.astype(np.int32)), values),
        "n_bytes": pa.array([row.n_bytes for row in rows], pa.int64()),
    }
    batch = pa.RecordBatch.from_pydict(columns, metadata={"tokenizer": tokenizer_digest})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return {
        "size_bytes": path.stat().st_size,
        "xxh3_128": file_xxh3(path),
        "n_documents": len(rows),
        "n_tokens": int(borders[-1]),
        "n_bytes": sum(row.n_bytes for row in rows),
    }
