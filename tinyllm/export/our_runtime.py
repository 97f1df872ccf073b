"""Our own model as one more runtime of the parity table: with its cache, or in INT8."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from tinyllm.inference.cache import KVCache
from tinyllm.model.transformer import Transformer


class OurModel:
    """A `Transformer`, with float or INT8 layers, on the CPU in evaluation mode."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        tensors = [*model.parameters(), *model.buffers()]
        self.n_bytes = sum(
            {t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values()
        )  # a tied matrix counts once

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits of every position of one sequence, (T, V), in one pass."""
        logits_TV: npt.NDArray[np.float32] = self._model(torch.tensor([ids]))[0].numpy()
        return logits_TV

    @torch.inference_mode()
    def greedy(
        self, prompt_ids: Sequence[int], n_tokens: int
    ) -> tuple[list[int], npt.NDArray[np.float32]]:
        """Take the likeliest next token `n_tokens` times; return the logits of each as well."""
        n_positions = len(prompt_ids) + n_tokens
        cache = KVCache(self._model.config, 1, n_positions, torch.float32, "cpu")
        new, answer, steps = list(prompt_ids), [], []
        for _ in range(n_tokens):
            hidden = self._model.hidden(torch.tensor([new]), cache=cache)
            steps.append(self._model.head(hidden[:, -1])[0].numpy())
            new = [int(steps[-1].argmax())]
            answer += new
        return answer, np.stack(steps)
