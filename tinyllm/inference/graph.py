"""One token through the model with fixed shapes and addresses, so that a card can replay it.

A small model decodes at the speed of its launches, some hundreds per token: a CUDA graph makes
them one. Attention gets the cache's whole memory and how much of it is filled, a number on the card
(`ops.block.decode_attention`). Elsewhere the same step runs without a graph, which is what tests
compare. One sequence at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinyllm.inference.stored import Stored
from tinyllm.model.transformer import Transformer

WARM_UP = 2
"""Steps before the capture: weights are packed and kernels compiled and loaded there."""


class DecodeStep:
    """A captured step in the memory of a `KVCache`."""

    def __init__(self, model: Transformer, memory: Sequence[tuple[Stored, Stored]]) -> None:
        self._model, device = model, model.rope_cos.device
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._fixed = _FixedCache(memory, device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    @torch.inference_mode()
    def __call__(self, token: int, position: int) -> Tensor:
        """Read a token; return the logits after it, (1, V), which the next call writes over."""
        self._token.fill_(token)
        self._fixed.position.fill_(position)
        if not self._token.is_cuda:
            self._logits = self._run()
        elif self._graph is None:
            self._graph = self._capture()
        if self._graph is not None:
            self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _run(self) -> Tensor:
        """Make the step; the same position may be written again."""
        hidden = self._model.hidden(self._token, cache=self._fixed)
        return self._model.head(hidden[:, -1])

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Return the step as a graph that writes `_logits`."""
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                self._run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._run()
        return graph


class _FixedCache:
    """A `model.transformer.Cache` whose only changing part is the number in `position`."""

    def __init__(self, memory: Sequence[tuple[Stored, Stored]], device: torch.device) -> None:
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.layers = [_FixedLayer(k, v, self.position) for k, v in memory]

    def plan(self, n_tokens: int) -> tuple[Tensor, Tensor]:
        """Return the position and the number of positions with it, both (1,)."""
        if n_tokens != 1:
            raise ValueError(f"one token at a time, not {n_tokens}")
        return self.position, self.position.to(torch.int32) + 1


class _FixedLayer:
    """One layer: a position is written, all are returned."""

    def __init__(self, k_BGSK: Stored, v_BGSK: Stored, position: Tensor) -> None:
        self._k, self._v, self._position = k_BGSK, v_BGSK, position

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new position; return the whole memory in k's dtype."""
        for stored, new in ((self._k, k_BGTK), (self._v, v_BGTK)):
            for memory, part in zip(stored.tensors, stored.encode(new), strict=True):
                memory.index_copy_(2, self._position, part)
        return self._k.to(k_BGTK.dtype), self._v.to(v_BGTK.dtype)
