"""Text to token ids and back, from a tokenizer.json that the pipeline made.

Text is never trusted: what looks like a special token in it stays text unless the caller asks
otherwise.
"""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from tinyllm.errors import ArtifactError
from tinyllm.tokenizer.alphabet import N_RESERVED, to_bytes
from tinyllm.tokenizer.special import END_OF_TEXT, SPECIAL_TOKENS
from tinyllm.tokenizer.split import chunks

T = TypeVar("T")
TOKENIZER_FILE = "tokenizer.json"
_PIECE_CHARACTERS = 50_000
_BATCH_CHARACTERS = 1_000_000  # 4 MB of UTF-8 at most: 90 MB in one call took 5.8 GB


def read_with(parse: Callable[[str], T], file: Path) -> T:
    """Return what `parse` makes of a file that prune_vocab wrote.

    Raises:
        ArtifactError: it is missing, is not UTF-8, or `parse` raises a ValueError.
    """
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(
            f"{file}: no such file; build it with `dvc repro prune_vocab`"
        ) from None
    except ValueError as error:  # UnicodeDecodeError is one
        reason = " ".join(str(error).split())
        raise ArtifactError(
            f"{file}: damaged: {reason}; rebuild it or run `dvc checkout`"
        ) from None


class Tokenizer:
    """A byte-level BPE vocabulary; any text can be encoded and comes back unchanged."""

    def __init__(self, document: str) -> None:
        """Read the content of a tokenizer.json.

        Raises:
            ValueError: it is not one of ours.
        """
        self.vocab_size, self._bytes = _token_bytes(document)
        # Two encoders, because the switch is a state of the encoder and threads may share us.
        self._with_special, self._plain = _encoder(document), _encoder(document)
        self._plain.encode_special_tokens = True

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Load a tokenizer.json, or the one in a folder.

        Raises:
            ArtifactError: it is missing or damaged.
        """
        file = path / TOKENIZER_FILE if path.is_dir() else path
        return read_with(cls, file)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Return the ids of a text.

        Args:
            text: any text; a lone surrogate becomes U+FFFD.
            allow_special: turn the names of special tokens into their ids; only for text of ours.
        """
        encoder = self._with_special if allow_special else self._plain
        ids: list[int] = encoder.encode(_well_formed(text), add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on all cores; special tokens stay text."""
        result: list[list[int]] = [[] for _ in texts]
        for batch in _batches(texts):
            pieces = [piece for _, piece in batch]
            encodings = self._plain.encode_batch_fast(pieces, add_special_tokens=False)
            for (i, _), encoding in zip(batch, encodings, strict=True):
                result[i] += encoding.ids
        return result

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of the ids; bytes that are no UTF-8 become U+FFFD."""
        raw = b"".join(self.token_bytes(i, skip_special=skip_special) for i in ids)
        return raw.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """Return the bytes of one token; a special token has none, or its name."""
        if skip_special and token_id < len(SPECIAL_TOKENS):
            return b""
        return self._bytes[token_id]

    def n_bytes(self, ids: Iterable[int]) -> int:
        """Return how many bytes of text the ids stand for; special tokens count nothing."""
        return sum(len(self.token_bytes(i)) for i in ids)

    def id_of(self, special: str) -> int:
        """Return the id of a special token.

        Raises:
            ValueError: there is no such special token.
        """
        return SPECIAL_TOKENS.index(special)

    @property
    def end_of_text(self) -> int:
        """The id of the token that ends every document."""
        return self.id_of(END_OF_TEXT)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The encoder of the `tokenizers` library that turns special names into ids."""
        return self._with_special


class TextStream:
    """Text of ids that come one by one: a character appears when its last byte is there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """Return the characters that this token completes; a special token completes none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Return U+FFFD for a character that was begun and not completed, else nothing."""
        return self._decoder.decode(b"", final=True)


def _token_bytes(document: str) -> tuple[int, list[bytes]]:
    """Return the size of the vocabulary and the bytes of each token by id.

    Raises:
        ValueError: not a tokenizer of this pipeline.
    """
    try:
        content: dict[str, Any] = json.loads(document)
        vocabulary: dict[str, int] = content["model"]["vocab"]
        special = [token["content"] for token in content["added_tokens"]]
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        ids = [vocabulary[token] for token in tokens]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("not a tokenizer.json with a vocabulary") from None
    if ids != list(range(len(ids))) or len(ids) < N_RESERVED:
        raise ValueError("its ids are not 0, 1, 2, ... with all bytes")
    n_special = len(SPECIAL_TOKENS)
    if tuple(special) != SPECIAL_TOKENS or tuple(tokens[:n_special]) != SPECIAL_TOKENS:
        raise ValueError(f"its special tokens are not {', '.join(SPECIAL_TOKENS)}")
    try:
        text = [to_bytes(token) for token in tokens[n_special:]]
    except KeyError as error:
        raise ValueError(f"a token has the character {error}, which stands for no byte") from None
    return len(ids), [name.encode("utf-8") for name in special] + text


def _encoder(document: str) -> tokenizers.Tokenizer:
    """Return the library's encoder.

    Raises:
        ValueError: the library refuses the document.
    """
    try:
        return tokenizers.Tokenizer.from_str(document)
    except Exception as error:  # the library raises Exception itself
        raise ValueError(str(error)) from None


def _batches(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """Yield (index of the text, piece) in batches of bounded size."""
    batch: list[tuple[int, str]] = []
    size = 0
    for i, text in enumerate(texts):
        for piece in chunks(_well_formed(text), _PIECE_CHARACTERS):
            batch.append((i, piece))
            size += len(piece)
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _well_formed(text: str) -> str:
    """Return the text with U+FFFD for lone surrogates, which no UTF-8 can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
