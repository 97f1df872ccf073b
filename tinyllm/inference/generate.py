"""Text generation, one token after the other, as an iterator that can be left at any time.

One sequence at a time; batches of requests are a scheduler's work, not done here.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from tinyllm.errors import DataError
from tinyllm.inference.cache import KVCache
from tinyllm.inference.reader import Reader
from tinyllm.inference.sampling import SamplingParams, sample
from tinyllm.model.transformer import Transformer

StopReason = Literal["stop", "length", "context"]
"""A stop token came, `max_new_tokens` were made, or the model's context is full."""
CACHES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
"""What keys and values may be kept as, by the names that users write."""


class Generation(Iterator[int]):
    """The tokens of one answer as they come; afterwards `reason` says why it ended."""

    def __init__(
        self,
        model: Transformer,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        stop_ids: Collection[int],
        *,
        use_cache: bool,
    ) -> None:
        self.reason: StopReason | None = None
        """Why the tokens ended; None while they come."""
        self._model, self._sampling, self._stop_ids = model, sampling, frozenset(stop_ids)
        self._n_prompt, self._ids = len(prompt_ids), list(prompt_ids)
        self._device = model.rope_cos.device
        self._generator = torch.Generator(self._device).manual_seed(sampling.seed)
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            size = 1, model.config.vocab_size
            self._seen = torch.zeros(size, dtype=torch.bool, device=self._device)
            self._seen[0, torch.tensor(self._ids)] = True
        self._reader: Reader | None = None
        if use_cache:
            longest = min(model.config.max_seq_len, len(self._ids) + sampling.max_new_tokens)
            cache = KVCache(model.config, 1, longest, cache_dtype(model), self._device)
            self._reader = Reader(model, cache)

    def __next__(self) -> int:
        if self.reason is None:
            self.reason = self._full()
        if self.reason is not None:
            raise StopIteration
        token = self._choose()
        if self._seen is not None:
            self._seen[0, token] = True
        if token in self._stop_ids:
            self.reason = "stop"
            raise StopIteration
        self._ids.append(token)
        return token

    def _choose(self) -> int:
        """Return the next token, from one pass."""
        return sample(self._logits(), self._seen, self._sampling, self._generator)[0]

    def _full(self) -> StopReason | None:
        """Return the limit that is reached, if one is."""
        if len(self._ids) - self._n_prompt >= self._sampling.max_new_tokens:
            return "length"
        return "context" if len(self._ids) >= self._model.config.max_seq_len else None

    def _logits(self) -> Tensor:
        """Return the logits after the last token, (1, V): only new tokens pass a cached model."""
        if self._reader is not None:
            return self._reader(self._ids[self._reader.cache.length :])
        with torch.inference_mode():
            return self._model.next_logits(torch.tensor([self._ids], device=self._device))


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    sampling: SamplingParams,
    stop_ids: Collection[int],
    *,
    use_cache: bool = True,
) -> Generation:
    """Return an iterator over the tokens that continue a prompt.

    Args:
        model: in evaluation mode.
        prompt_ids: at least one token.
        sampling: how tokens are chosen, and how many at most.
        stop_ids: tokens that end the text; they are not returned.
        use_cache: keep keys and values; without it every token costs a pass over all before it.

    Raises:
        DataError: the prompt is empty or fills the model's context.
    """
    check_prompt(model, prompt_ids)
    return Generation(model, prompt_ids, sampling, stop_ids, use_cache=use_cache)


def check_prompt(model: Transformer, prompt_ids: Sequence[int]) -> None:
    """Refuse a prompt that is empty or leaves no room.

    Raises:
        DataError: with the number of tokens and what the model takes.
    """
    longest = model.config.max_seq_len
    if not 0 < len(prompt_ids) < longest:
        raise DataError(
            f"prompt: has {len(prompt_ids)} tokens, this model takes 1 to {longest - 1};"
            " shorten it or train with a larger model.max_seq_len"
        )


def compute_dtype(model: Transformer) -> torch.dtype:
    """Return the dtype of the model's first floating-point parameter or buffer, else fp32."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def cache_dtype(model: Transformer) -> torch.dtype:
    """Return what a model's keys and values are stored as.

    What its `cache_dtype` says, else `compute_dtype`, but bf16 beside INT8: in fp32 they are a
    tenth of what a token of an INT8 model reads. docs/int8.md has the cost of each.
    """
    if model.cache_dtype is not None:
        return model.cache_dtype
    is_int8 = any(buffer.dtype is torch.int8 for buffer in model.buffers())
    return torch.bfloat16 if is_int8 else compute_dtype(model)
