"""Where the guesses of speculative decoding come from: the text itself, or a cheaper model."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from tinyllm.errors import DataError
from tinyllm.inference.cache import KVCache
from tinyllm.inference.generate import cache_dtype
from tinyllm.inference.reader import Reader
from tinyllm.inference.sampling import SamplingParams, draw, token_odds
from tinyllm.inference.scheduler import shared_start
from tinyllm.model.transformer import Transformer

NGRAMS = (3, 2)
"""Lengths of the tails that are looked up, the longest first: one token says too little."""


class Draft(Protocol):
    """Guesses what comes next in one text."""

    def propose(self, ids: Sequence[int], n: int) -> tuple[list[int], Tensor | None]:
        """Return at most n guesses that follow the tokens, and the odds they were drawn with.

        The odds are (guesses, V); None: the guesses are certain, not drawn.
        """


class LookupDraft:
    """What followed the last time the text had the same tail: good where texts repeat themselves.

    Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding).
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._n_indexed = 0

    def propose(self, ids: Sequence[int], n: int) -> tuple[list[int], Tensor | None]:
        """Return the tokens behind the latest earlier occurrence of the tail, or none."""
        for end in range(self._n_indexed, len(ids)):  # the tail itself is left out
            for length in NGRAMS:
                if length <= end:
                    self._ends[tuple(ids[end - length : end])] = end
        self._n_indexed = len(ids)
        for length in NGRAMS:
            end = self._ends.get(tuple(ids[-length:]), 0)
            if end:
                return list(ids[end : end + n]), None
        return [], None


class ModelDraft:
    """A smaller model of the same vocabulary, or the same one made cheaper."""

    def __init__(self, model: Transformer, sampling: SamplingParams) -> None:
        """Take a model.

        Args:
            model: in evaluation mode.
            sampling: that of the text; guesses are drawn alike, with draws of their own.
        """
        self._sampling = replace(sampling, repetition_penalty=1.0)
        self._generator = torch.Generator(model.rope_cos.device).manual_seed(sampling.seed + 1)
        longest = model.config.max_seq_len
        cache = KVCache(model.config, 1, longest, cache_dtype(model), model.rope_cos.device)
        self._reader = Reader(model, cache)
        self._cached: list[int] = []

    def propose(self, ids: Sequence[int], n: int) -> tuple[list[int], Tensor | None]:
        """Return n guesses, drawn one after the other; fewer at the end of its context."""
        same = min(shared_start(self._cached, ids), len(ids) - 1)
        cache = self._reader.cache
        cache.truncate(same)
        new, guesses, odds = list(ids[same:]), [], []
        for _ in range(min(n, cache.max_len - len(ids) + 1)):
            odds_1V = token_odds(self._reader(new), None, self._sampling)
            token = draw(odds_1V, self._generator)[0]
            guesses.append(token)
            odds.append(odds_1V)
            new = [token]
        self._cached = [*ids, *guesses[:-1]]
        if not guesses or self._sampling.temperature == 0:
            return guesses, None
        return guesses, torch.cat(odds)


def first_layers(model: Transformer, n_layers: int) -> Transformer:
    """Return the model without its last layers; the weights are shared, nothing is copied.

    Raises:
        DataError: it does not have more layers than that.
    """
    n_all = model.config.n_layers
    if not 0 < n_layers < n_all:
        advice = f"take 1 to {n_all - 1}" if n_all > 1 else "choose another draft"
        raise DataError(f"draft: {n_layers} layers of {n_all} make no cheaper model; {advice}")
    draft = copy.copy(model)
    draft._modules = {**model._modules, "layers": nn.ModuleList(list(model.layers)[:n_layers])}
    draft.config = replace(model.config, n_layers=n_layers)
    return draft
