"""Answers that are JSON of a given schema: which tokens may come next, by `llguidance`.

The schema becomes a grammar of bytes. After every token it says which of the vocabulary leave the
answer the beginning of such JSON; a token that ends answers is among them once the JSON is whole.
Dimensions: V vocabulary.
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from tinyllm.errors import DataError
from tinyllm.tokenizer.tokenizer import Tokenizer


class Guide:
    """What may come next in one answer."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> Tensor:
        """Return the tokens that may come next, (V,) bool."""
        bits = np.unpackbits(
            np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little"
        )
        return torch.from_numpy(bits[: self._vocab_size].astype(bool))

    def take(self, token: int) -> None:
        """Go on behind a token that was allowed."""
        if not self._matcher.consume_token(token):
            raise ValueError(self._matcher.get_error())


class Guides:
    """Makes guides for the answers of one model."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
        """Name the tokenizer and the tokens that end answers."""
        self._tokenizer, self._stop_ids = tokenizer, sorted(stop_ids)

    @functools.cached_property
    def _vocabulary(self) -> LLTokenizer:
        """The tokenizer as the library wants it; made for the first answer that needs it."""
        document = self._tokenizer.backend.to_str()
        return LLTokenizer(document, self._tokenizer.vocab_size, self._stop_ids)

    def make(self, schema: Mapping[str, Any]) -> Guide:
        """Return a guide to an answer of this JSON schema, without spaces between its parts.

        Raises:
            DataError: the schema is none, or asks for something that cannot be enforced.
        """
        # a small model that may write spaces or line breaks writes nothing else
        grammar = LLMatcher.grammar_from_json_schema(
            dict(schema), overrides={"whitespace_flexible": False}
        )
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise DataError(f"the schema cannot be used: {matcher.get_error().splitlines()[0]}")
        return Guide(matcher, self._tokenizer.vocab_size)
