"""What a speed measurement needs of a model: pass a prompt, make the next token, give logits."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tinyllm.inference.cache import KVCache
from tinyllm.inference.generate import cache_dtype
from tinyllm.inference.reader import Reader
from tinyllm.inference.sampling import likeliest
from tinyllm.model.transformer import Transformer
from tinyllm.quantization.load import load_any_model


class Runner(Protocol):
    """One model under measurement; every call is finished when it returns."""

    rope_cos: Tensor
    """Any tensor on the model's device."""

    def prefill(self, ids: Sequence[int]) -> int:
        """Start a sequence with a prompt, keep its keys and values; return the likeliest token."""

    def decode(self, token: int) -> int:
        """Add one token to the sequence; return the likeliest next one."""

    def full(self, ids: Sequence[int]) -> int:
        """Pass a whole sequence without a cache; return the likeliest next token."""

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Return the logits of every position, (B, T, V)."""


OpenRunner = Callable[[], Runner]
"""Opens a model in the process that measures it; picklable."""


class TorchRunner:
    """A `Transformer`, with float or INT8 layers."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self.rope_cos = model.rope_cos
        config = model.config
        cache = KVCache(config, 1, config.max_seq_len, cache_dtype(model), model.rope_cos.device)
        self._read = Reader(model, cache)

    @classmethod
    def open(cls, directory: Path, dtype: torch.dtype | None, device: str) -> "TorchRunner":
        """Load any model directory.

        Args:
            directory: the model.
            dtype: of the weights; None: as they are. Rotary tables stay in fp32.
            device: where to compute.
        """
        model = load_any_model(directory).to(device).eval()
        if dtype is not None:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
        return cls(model)

    def prefill(self, ids: Sequence[int]) -> int:
        """Pass the prompt; only its last position goes through the head."""
        self._read.cache.truncate(0)
        return likeliest(self._read(ids).float())[0]

    def decode(self, token: int) -> int:
        """Pass one token."""
        return likeliest(self._read([token]).float())[0]

    @torch.inference_mode()
    def full(self, ids: Sequence[int]) -> int:
        """Pass everything again."""
        ids_1T = torch.tensor([ids], device=self.rope_cos.device)
        return int(self._model.next_logits(ids_1T).argmax())

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self._model(ids_BT)
        return logits
