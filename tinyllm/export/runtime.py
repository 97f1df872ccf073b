"""An exported ONNX file in ONNX Runtime: one call per pass, and greedy decoding.

Dimensions: B batch, T new positions, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from tinyllm.errors import ArtifactError
from tinyllm.export.onnx import LOGITS, past_names, present_names

Past = list[Any]
"""Keys and values of all layers as ONNX Runtime holds them: no copy between two steps."""


def open_session(path: Path, n_threads: int) -> Any:
    """Return ONNX Runtime's session over a file.

    Args:
        path: an ONNX file.
        n_threads: cores for one pass.

    Raises:
        ArtifactError: missing, or not a file that ONNX Runtime can read.
    """
    import onnxruntime as ort

    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; build it with `dvc repro export`")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = n_threads, 1
    options.log_severity_level = 3  # warnings about dropped constants are not for the user
    # between two calls a waiting thread would otherwise burn the core that Python needs
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own exception classes have no common base
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{path}: ONNX Runtime cannot load it: {reason}") from None


def cache_dtype(kind: str) -> type[np.floating[Any]]:
    """Return what a cache holds, by ONNX Runtime's name: `tensor(float16)` or `tensor(float)`."""
    return np.float16 if kind == "tensor(float16)" else np.float32


class OnnxModel:
    """A session over one file; it holds no state between calls."""

    def __init__(self, path: Path, *, n_threads: int) -> None:
        """Open a file.

        Args:
            path: a file that `export_onnx` or `quantize_onnx` wrote.
            n_threads: cores for one pass; results do not depend on it beyond rounding.

        Raises:
            ArtifactError: missing, or not a file that ONNX Runtime can read.
        """
        import onnxruntime as ort

        self._session = open_session(path, n_threads)
        self._value = ort.OrtValue.ortvalue_from_numpy
        shapes = {node.name: node.shape for node in self._session.get_inputs()}
        self.n_layers = sum(name.endswith(".key") for name in shapes)
        self._past_names = past_names(self.n_layers)
        self._outputs = [LOGITS, *present_names(self.n_layers)]
        self._past_shapes = [shapes[name] for name in self._past_names]
        kinds = {node.name: node.type for node in self._session.get_inputs()}
        self._dtype = cache_dtype(kinds[self._past_names[0]])

    def empty_past(self, batch_size: int) -> Past:
        """Return the cache before the first token."""
        return [
            self._value(np.zeros((batch_size, n_heads, 0, width), self._dtype))
            for _, n_heads, _, width in self._past_shapes
        ]

    def forward(
        self,
        ids_BT: npt.NDArray[np.int64],
        past: Past,
        attention_mask: npt.NDArray[np.int64] | None = None,
    ) -> tuple[npt.NDArray[np.float32], Past]:
        """Return the logits of the new tokens, (B, T, V), and the cache that now has them.

        Args:
            ids_BT: new tokens.
            past: the cache so far; it stays as it is.
            attention_mask: (B, earlier + T), 0 for padding on the left; None: no padding.
        """
        B, T = ids_BT.shape
        total = past[0].shape()[2] + T
        if attention_mask is None:
            attention_mask = np.ones((B, total), np.int64)
        positions = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)[:, -T:]
        feeds = {
            "input_ids": self._value(np.ascontiguousarray(ids_BT)),
            "attention_mask": self._value(attention_mask),
            "position_ids": self._value(np.ascontiguousarray(positions)),
            **dict(zip(self._past_names, past, strict=True)),
        }
        logits, *present = self._session.run_with_ort_values(self._outputs, feeds)
        return cast("npt.NDArray[np.float32]", logits.numpy()), present

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits of every position of one sequence, (T, V), in one pass."""
        logits_TV: npt.NDArray[np.float32] = self.forward(
            np.array([ids], np.int64), self.empty_past(1)
        )[0][0]
        return logits_TV

    def greedy(
        self, prompt_ids: Sequence[int], n_tokens: int
    ) -> tuple[list[int], npt.NDArray[np.float32]]:
        """Take the likeliest next token, `n_tokens` times; one pass per token with the cache.

        Returns:
            The tokens, and the logits that each was taken from, (n_tokens, V).
        """
        past, new = self.empty_past(1), list(prompt_ids)
        answer: list[int] = []
        steps: list[npt.NDArray[np.float32]] = []
        for _ in range(n_tokens):
            logits, past = self.forward(np.array([new], np.int64), past)
            steps.append(logits[0, -1])
            new = [int(steps[-1].argmax())]
            answer += new
        return answer, np.stack(steps)
