"""Token shards from disk: checked when opened, memory-mapped, never copied.

Arrow has no checksum: a file with a flipped bit opens and passes its own validation. So every
shard is compared with the manifest (size and xxh3_128, 28 GB/s) before its first token is used.
"""

from collections.abc import Iterator, Mapping
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import xxhash

from tinyllm.artifact import MANIFEST, Manifest, load_manifest
from tinyllm.errors import ArtifactError, DataError, LineageError
from tinyllm.shards.stream import Tokens, TokenStream
from tinyllm.tokenizer.special import END_OF_TEXT
from tinyllm.tokenizer.tokenizer import Tokenizer

_HASH_BLOCK_BYTES = 1 << 24
LOOKED_AT = 1000
"""Documents whose ends are checked."""


class TokenShards:
    """One split of the token shards.

    Attributes:
        n_tokens: tokens in all documents, their ends included.
        n_bytes: UTF-8 bytes of the text they came from.
        vocab_size: of the tokenizer that wrote them.
        stream: the tokens in a row.
    """

    def __init__(self, batches: list[pa.RecordBatch], vocab_size: int, name: str) -> None:
        self._tokens = [batch.column("tokens") for batch in batches]
        self.stream = TokenStream(
            [tokens.values.to_numpy(zero_copy_only=True) for tokens in self._tokens], name
        )
        self.n_tokens = len(self.stream)
        self.n_bytes = sum(int(batch.column("n_bytes").to_numpy().sum()) for batch in batches)
        self.vocab_size = vocab_size

    @classmethod
    def open(
        cls, directory: Path, split: Literal["train", "val"], tokenizer_digest: str | None
    ) -> "TokenShards":
        """Open a split and check every shard of it.

        Args:
            directory: an artifact of kind `tokens`.
            split: the part of it.
            tokenizer_digest: of the tokenizer's manifest that the shards must come from; None: any.

        Raises:
            LineageError: the shards were written with another tokenizer.
            ArtifactError: a shard is missing, cut short or changed.
            DataError: the split has no documents.
        """
        manifest = load_manifest(directory, "tokens")
        shards = _shard_entries(directory, split, manifest)
        if not shards:
            raise DataError(f"{directory / split}: no documents; give the {split} split some text")
        made_with = manifest.info["tokenizer"]
        if tokenizer_digest is not None and tokenizer_digest != made_with:
            raise LineageError(
                f"{directory / shards[0]['file']}: written with tokenizer {made_with[:12]}, not"
                f" {tokenizer_digest[:12]}; run `dvc repro encode` with the tokenizer you use"
            )
        batches = [_open_shard(directory / entry["file"], entry, made_with) for entry in shards]
        return cls(batches, manifest.info["vocab_size"], str(directory / split))

    def documents(self) -> Iterator[Tokens]:
        """Yield the tokens of each document, its end included."""
        for shard, tokens in zip(self.stream.shards, self._tokens, strict=True):
            borders = tokens.offsets.to_numpy()
            for start, stop in pairwise(borders):
                yield shard[start:stop]

    def check_ends(self, tokenizer: Tokenizer, *, wanted: bool) -> None:
        """Refuse documents that do not end with <|endoftext|>, if wanted; the first ones are read.

        Raises:
            DataError: a model that learns from them would never stop.
        """
        end_id = tokenizer.id_of(END_OF_TEXT)
        for i, document in enumerate(islice(self.documents(), LOOKED_AT * wanted)):
            if len(document) == 0 or document[-1] != end_id:
                raise DataError(
                    f"{self.stream.name}: document {i} does not end with {END_OF_TEXT};"
                    " run `dvc repro --force encode`"
                )


def _shard_entries(directory: Path, split: str, manifest: Manifest) -> list[dict[str, Any]]:
    """Return what the manifest says of the split's shards."""
    try:
        entries: list[dict[str, Any]] = manifest.info["splits"][split]["shards"]
    except (KeyError, TypeError):
        raise ArtifactError(
            f"{directory / MANIFEST}: has no shards of {split!r}; rebuild with `dvc repro encode`"
        ) from None
    return entries


def _open_shard(path: Path, entry: Mapping[str, Any], tokenizer: str) -> pa.RecordBatch:
    """Map a shard into memory after comparing it with its manifest entry."""
    repair = "run `dvc checkout` or `dvc repro --force encode`"
    if not path.is_file():
        raise ArtifactError(f"{path}: missing; {repair}")
    size = path.stat().st_size
    if size != entry["size_bytes"]:
        raise ArtifactError(f"{path}: {size} bytes, not {entry['size_bytes']}; {repair}")
    if (written_with := _tokenizer_of(path)) not in (None, tokenizer):
        raise LineageError(
            f"{path}: written with tokenizer {str(written_with)[:12]}, not {tokenizer[:12]};"
            f" {repair}"
        )
    if file_xxh3(path) != entry["xxh3_128"]:
        raise ArtifactError(f"{path}: its content has changed since it was written; {repair}")
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


def _tokenizer_of(path: Path) -> str | None:
    """Return the tokenizer digest that a shard itself names; None if it is not readable."""
    try:
        with pa.memory_map(str(path)) as file:
            metadata = pa.ipc.open_file(file).schema.metadata or {}
            return str(metadata[b"tokenizer"].decode("ascii"))
    except (pa.ArrowInvalid, pa.ArrowException, OSError, KeyError, UnicodeDecodeError):
        return None


def file_xxh3(path: Path) -> str:
    """Return the xxh3_128 of a file as hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
