"""A tokenizer.json from text: byte-level BPE by the `tokenizers` library.

Same text and parameters, same bytes: ties between equally frequent pairs are broken by their ids.
`bpe.py` has the same algorithm to read.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import tokenizers
import xxhash
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from tinyllm.errors import DataError
from tinyllm.tokenizer.alphabet import N_RESERVED
from tinyllm.tokenizer.special import SPECIAL_TOKENS
from tinyllm.tokenizer.split import PATTERN, chunks
from tinyllm.tokenizer.tokenizer import Tokenizer

_PIECE_CHARACTERS = 1_000_000  # a piece is 4 MB of UTF-8 at most, or up to the next safe cut


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerParams:
    """The `tokenizer` section."""

    vocab_size: int
    """Tokens, with the 256 bytes and the special ones; fewer if the text has not enough pairs."""
    min_count: int
    """A pair becomes a token only if it stands in the text this often; at least 1."""
    sample_bytes: int
    """Train on at most this many bytes of text, spread over the documents by a hash."""

    def __post_init__(self) -> None:
        problems = []
        if self.vocab_size < N_RESERVED:
            problems.append(
                f"vocab_size: {self.vocab_size} has no room for {N_RESERVED - len(SPECIAL_TOKENS)}"
                f" bytes and {len(SPECIAL_TOKENS)} special tokens; give {N_RESERVED} or more"
            )
        if self.min_count < 1:
            problems.append(f"min_count: {self.min_count} is below 1; 2 is usual")
        if self.sample_bytes < 1:
            problems.append(f"sample_bytes: {self.sample_bytes} is below 1; 100000000 is plenty")
        if problems:
            raise ValueError("\n".join(problems))


def train_bpe(texts: Iterable[str], params: TokenizerParams) -> str:
    """Learn a vocabulary.

    Args:
        texts: what to learn from, each once.
        params: how large it gets.

    Returns:
        the content of a tokenizer.json.

    Raises:
        DataError: there is no text.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=params.vocab_size,
        min_frequency=params.min_count,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in chunks(text, _PIECE_CHARACTERS))
    first = next(pieces, None)
    if first is None:
        raise DataError("train: no text to train a tokenizer on; give the train split some text")
    tokenizer.train_from_iterator(_prepend(first, pieces), trainer)
    return str(tokenizer.to_str(pretty=True)) + "\n"


def sample_texts(texts: Callable[[], Iterable[str]], n_bytes: int) -> Iterator[str]:
    """Yield all texts, or a part of at most `n_bytes` chosen by a hash of each text.

    Only where the hash was too generous does the order matter: the last ones are left out.

    Args:
        texts: gives the texts anew at each call; they are read twice.
        n_bytes: UTF-8 bytes.
    """
    total = sum(len(text.encode("utf-8")) for text in texts())
    limit = 2**64 if total <= n_bytes else 2**64 * n_bytes // total
    taken = 0
    for text in texts():
        raw = text.encode("utf-8")
        if xxhash.xxh3_64_intdigest(raw) < limit and taken + len(raw) <= n_bytes:
            taken += len(raw)
            yield text


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Return how many UTF-8 bytes a token stands for on average; document ends not counted.

    Raises:
        DataError: there is no text.
    """
    n_bytes = n_tokens = 0
    for text in texts:
        n_bytes += len(text.encode("utf-8"))
        n_tokens += len(tokenizer.encode_batch([text])[0])
    if not n_tokens:
        raise DataError("val: no text to measure a tokenizer on; give the val split some text")
    return n_bytes / n_tokens


def _prepend(first: str, rest: Iterator[str]) -> Iterator[str]:
    """Yield one text, then the others."""
    yield first
    yield from rest
