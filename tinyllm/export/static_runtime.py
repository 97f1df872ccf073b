"""The two files of `onnx_static.py` in ONNX Runtime: a prompt by chunks, then token by token.

What a program on a chip without dynamic shapes does: it owns the cache, and tells each pass where
in it the new tokens stand. Dimensions: T new positions, S slots, V vocabulary.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.errors import DataError
from tinyllm.export.onnx import LOGITS, past_names, present_names
from tinyllm.export.onnx_fp16 import round_everything
from tinyllm.export.onnx_static import DECODE, PREFILL, new_names
from tinyllm.export.runtime import cache_dtype, open_session

Cache = list[npt.NDArray[Any]]
"""Keys and values of all layers, (1, G, S, K) each, in the order of `past_names`."""


def open_rounded(directory: Path, *, n_threads: int) -> "StaticModel":
    """Open the files of a folder with every result of every operator rounded to fp16.

    What a chip that computes in fp16 sees; `onnx_fp16.py` says why fp16 files do not show it here.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in (PREFILL, DECODE):
            round_everything(directory / name, Path(folder) / name)
        return StaticModel(Path(folder), n_threads=n_threads)


class StaticModel:
    """A session over each of the two files; the cache is the caller's."""

    def __init__(self, directory: Path, *, n_threads: int) -> None:
        """Open a folder.

        Args:
            directory: what `export_static` wrote; the files tell who writes the cache.
            n_threads: cores for one pass.

        Raises:
            ArtifactError: a file is missing, or not one that ONNX Runtime can read.
        """
        self._prefill = open_session(directory / PREFILL, n_threads)
        self._decode = open_session(directory / DECODE, n_threads)
        inputs = {node.name: node for node in self._prefill.get_inputs()}
        n_layers = sum(name.endswith(".key") for name in inputs)
        self._past = past_names(n_layers)
        self._shapes = [inputs[name].shape for name in self._past]
        self._dtype = cache_dtype(inputs[self._past[0]].type)
        self.chunk: int = inputs["input_ids"].shape[1]
        self.n_slots: int = self._shapes[0][2]
        outputs = {node.name for node in self._decode.get_outputs()}
        self.writes_on_host = new_names(n_layers)[0] in outputs
        names = new_names if self.writes_on_host else present_names
        self._outputs = [LOGITS, *names(n_layers)]

    def empty_cache(self) -> Cache:
        """Return the cache before the first token. Zeros: what is not looked at must be finite."""
        return [np.zeros(shape, self._dtype) for shape in self._shapes]

    def forward(
        self, ids: Sequence[int], position: int, cache: Cache
    ) -> tuple[npt.NDArray[np.float32], Cache]:
        """Return the logits of the new tokens, (T, V), and the cache that now has them.

        Args:
            ids: new tokens, at least one.
            position: of the first.
            cache: the earlier ones; not to be used again.

        Raises:
            DataError: the tokens do not fit into the cache.
        """
        if position + len(ids) > self.n_slots:
            raise DataError(
                f"context: {position + len(ids)} tokens do not fit into a cache of {self.n_slots};"
                " shorten the prompt or ask for fewer tokens"
            )
        pieces = []
        while ids:
            # one token needs no chunk, and a chunk may not reach beyond the last slot
            fits = len(ids) > 1 and position + self.chunk <= self.n_slots
            n = min(self.chunk, len(ids)) if fits else 1
            logits, cache = self._run(fits, ids[:n], position, cache)
            pieces.append(logits)
            ids, position = ids[n:], position + n
        return np.concatenate(pieces), cache

    def _run(
        self, by_chunk: bool, ids: Sequence[int], position: int, cache: Cache
    ) -> tuple[npt.NDArray[np.float32], Cache]:
        """Run one file over one chunk or one token; arguments as in `forward`."""
        session, width = (self._prefill, self.chunk) if by_chunk else (self._decode, 1)
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(ids)] = ids
        feeds = {"input_ids": padded, "position": np.array([position], np.int32)}
        feeds |= dict(zip(self._past, cache, strict=True))
        logits, *written = session.run(self._outputs, feeds)
        if self.writes_on_host:
            for slots, new in zip(cache, written, strict=True):
                slots[:, :, position : position + len(ids)] = new[:, :, : len(ids)]
            written = cache
        return logits[0, : len(ids)], written

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits of every position of one sequence, (T, V), read by chunks."""
        return self.forward(ids, 0, self.empty_cache())[0]

    def greedy(
        self, prompt_ids: Sequence[int], n_tokens: int
    ) -> tuple[list[int], npt.NDArray[np.float32]]:
        """Take the likeliest next token, `n_tokens` times; one pass per token.

        Returns:
            The tokens, and the logits that each was taken from, (n_tokens, V).
        """
        cache, new, position = self.empty_cache(), list(prompt_ids), 0
        answer: list[int] = []
        steps: list[npt.NDArray[np.float32]] = []
        for _ in range(n_tokens):
            logits, cache = self.forward(new, position, cache)
            position += len(new)
            steps.append(logits[-1])
            new = [int(steps[-1].argmax())]
            answer += new
        return answer, np.stack(steps)
