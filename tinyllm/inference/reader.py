"""A model that reads one sequence: tokens go in, the logits behind the last one come out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinyllm.inference.cache import KVCache
from tinyllm.inference.graph import DecodeStep
from tinyllm.model.transformer import Transformer


class Reader:
    """A model and the cache that it fills, on the shortest way there is.

    Weights that stream past push everything else out of the processor's caches, Python's own code
    too: of 3.7 ms that a token of d 768 took, 0.4 went into tensors for one number and for logits.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        """Take a model in evaluation mode and the cache of one sequence."""
        self.cache = cache
        self._model, self._device = model, model.rope_cos.device
        self._native = model.sequence_decoder(cache)
        self._graph: DecodeStep | None = None
        if self._device.type == "cuda":  # only cards replay graphs
            self._graph = DecodeStep(model, cache.memory())

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """Append tokens; return the logits after the last, (1, V), which the next call may change.

        Raises:
            DataError: the cache is full.
        """
        if self._native is not None:
            return self._native.logits(ids, self.cache.reserve(len(ids)))
        if self._graph is not None and len(ids) == 1:
            return self._graph(ids[0], self.cache.reserve(1))
        with torch.inference_mode():
            return self._model.next_logits(torch.tensor([ids], device=self._device), self.cache)
