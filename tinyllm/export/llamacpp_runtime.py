"""A GGUF file in llama.cpp, by way of llama-cpp-python; only for proving the export.

The calls are those of llama.cpp's C interface, so that what is compared is what it computes: fp32
keys and values (its default, F16, alone moves logits by 1e-3), no flash attention, no sampling.
"""

import ctypes
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from tinyllm.errors import ArtifactError, DataError
from tinyllm.export.gguf import read_gguf

PACKAGE = "llama_cpp"


def has_llamacpp() -> bool:
    """Whether llama-cpp-python is installed."""
    return find_spec(PACKAGE) is not None


class LlamaCppModel:
    """A loaded file and one context; every call starts from an empty cache."""

    def __init__(self, path: Path, *, n_threads: int) -> None:
        """Load a file.

        Args:
            path: a file that `write_gguf` wrote, or any other GGUF file of a language model.
            n_threads: cores for one pass; results do not depend on it beyond rounding.

        Raises:
            DataError: llama-cpp-python is not installed.
            ArtifactError: missing, truncated, or not a model that llama.cpp can load.
        """
        if not has_llamacpp():
            raise DataError(
                "llama.cpp: not installed; `pip install llama-cpp-python` builds it (15 minutes)"
            )
        read_gguf(path)  # llama.cpp reports a damaged file on stderr, or ends the process
        self._lib = _library()
        parameters = self._lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._context = None
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise ArtifactError(f"{path}: llama.cpp cannot load it; was it written by an export?")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.vocab_size = int(self._lib.llama_vocab_n_tokens(self._vocab))
        self.max_seq_len = int(self._lib.llama_model_n_ctx_train(self._model))
        self._context = self._open_context(n_threads)

    def _open_context(self, n_threads: int) -> Any:
        lib = self._lib
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = self.max_seq_len
        parameters.n_threads = parameters.n_threads_batch = n_threads
        parameters.type_k = parameters.type_v = lib.GGML_TYPE_F32
        parameters.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.no_perf = True
        return lib.llama_init_from_model(self._model, parameters)

    def __del__(self) -> None:
        """Free what Python does not know of."""
        if getattr(self, "_context", None):
            self._lib.llama_free(self._context)
        if getattr(self, "_model", None):
            self._lib.llama_model_free(self._model)

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits of every position of one sequence, (T, V), in one pass."""
        self._forget()
        return self._forward(ids, 0)

    def greedy(
        self, prompt_ids: Sequence[int], n_tokens: int
    ) -> tuple[list[int], npt.NDArray[np.float32]]:
        """Take the likeliest next token, `n_tokens` times; one pass per token with its cache.

        Returns:
            The tokens, and the logits that each was taken from, (n_tokens, V).
        """
        self._forget()
        seen, new = 0, list(prompt_ids)
        answer: list[int] = []
        steps: list[npt.NDArray[np.float32]] = []
        for _ in range(n_tokens):
            steps.append(self._forward(new, seen)[-1])
            seen += len(new)
            new = [int(steps[-1].argmax())]
            answer += new
        return answer, np.stack(steps)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; what looks like a special token in it stays text, as ours."""
        raw = text.encode("utf-8")
        ids = (ctypes.c_int32 * max(1, len(raw)))()  # a token has at least one byte
        n = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, len(ids), False, False)
        return list(ids[:n])

    def _forget(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _forward(self, ids: Sequence[int], start: int) -> npt.NDArray[np.float32]:
        """Run new tokens from a position on and return the logits of all of them, (T, V)."""
        T = len(ids)
        if start + T > self.max_seq_len:  # llama.cpp would end the process
            raise DataError(
                f"llama.cpp: {start + T} tokens are more than the context of {self.max_seq_len}"
            )
        batch = self._lib.llama_batch_init(T, 0, 1)
        try:
            batch.n_tokens = T
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, True
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            code = self._lib.llama_decode(self._context, batch)
        finally:
            self._lib.llama_batch_free(batch)
        if code != 0:
            raise DataError(f"llama.cpp: cannot run {T} tokens after {start}: code {code}")
        logits = np.ctypeslib.as_array(
            self._lib.llama_get_logits(self._context), (T, self.vocab_size)
        )
        return cast("npt.NDArray[np.float32]", logits.copy())  # the next pass overwrites them


def _library() -> Any:
    """Return the module of llama.cpp's C interface, which from here on logs nothing."""
    import logging

    from llama_cpp import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    return llama_cpp
