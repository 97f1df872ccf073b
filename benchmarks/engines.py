"""The engines that decode.py compares: one interface, the same random weights."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from tinyllm.inference.cache import KVCache
from tinyllm.inference.generate import cache_dtype
from tinyllm.inference.reader import Reader
from tinyllm.model.sizes import ModelConfig
from tinyllm.model.transformer import Transformer
from tinyllm.quantization.int8 import quantize_model

Logits = npt.NDArray[np.float32]
MAX_LEN = 256


class Engine(Protocol):
    """A model with one sequence in its cache."""

    note: str
    """What the table adds to its name."""

    def set_threads(self, n: int) -> None:
        """Compute with n threads from now on."""

    def clear(self) -> None:
        """Forget the sequence."""

    def read(self, ids: list[int]) -> Logits:
        """Append tokens; return the logits after the last one, (V,)."""


def config_of(d: int, n_layers: int, n_heads: int, vocab_size: int, d_ff: int) -> ModelConfig:
    """Return a Llama-shaped model: tied, as many key-value heads as query heads."""
    return ModelConfig(
        vocab_size=vocab_size,
        d=d,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d // n_heads,
        d_ff=d_ff,
        qk_norm=False,
        tie_embeddings=True,
        rope_base=10000.0,
        norm_eps=1e-6,
        max_seq_len=MAX_LEN,
    )


class Ours:
    """Our model, in any format."""

    note = ""

    def __init__(self, model: Transformer) -> None:
        self._read = Reader(model, KVCache(model.config, 1, MAX_LEN, cache_dtype(model), "cpu"))

    def set_threads(self, n: int) -> None:
        """See `Engine`."""
        torch.set_num_threads(n)

    def clear(self) -> None:
        """See `Engine`."""
        self._read.cache.truncate(0)

    def read(self, ids: list[int]) -> Logits:
        """See `Engine`."""
        logits: Logits = self._read(ids).float().numpy()[0]
        return logits


def build_engines(model: Transformer, folder: Path) -> dict[str, Engine | None]:
    """Return every engine by its name, None for those that are not installed.

    Args:
        model: in fp32; its weights are bf16 afterwards.
        folder: for the files of engines that read files.
    """
    engines: dict[str, Engine | None] = {"ours INT8": Ours(quantize_model(model))}
    for name, (package, make) in PEERS.items():
        engine = make(model, folder) if importlib.util.find_spec(package) else None
        engines[name + engine.note if engine else name] = engine
    engines["torch bf16"] = Ours(model.bfloat16())
    return engines


def against_fp32(engine: Engine, prompt: list[int], expected_TV: Logits) -> dict[str, float]:
    """Return how far an engine's logits are off, and the share of its likeliest tokens."""
    engine.clear()
    n = len(prompt) - len(expected_TV) + 1
    found = [np.array(engine.read(prompt[:n]))]
    found += [np.array(engine.read([token])) for token in prompt[n:]]
    off = np.sqrt(np.mean((found - expected_TV) ** 2)) / expected_TV.std()
    same = np.argmax(found, axis=1) == np.argmax(expected_TV, axis=1)
    return {"off": float(off), "top_1": float(same.mean())}


def _llama_cpp(model: Transformer, folder: Path) -> Engine:
    from engine_llama import LlamaCpp, gguf_q8

    return LlamaCpp(gguf_q8(model, folder))


def _ik_llama(model: Transformer, folder: Path) -> Engine:
    from engine_llama import IkLlama, gguf_q8

    return IkLlama(gguf_q8(model, folder))


def _genai(model: Transformer, folder: Path) -> Engine:
    from engine_genai import Genai, write_genai

    return Genai(write_genai(model, folder / "genai"))


def _openvino(model: Transformer, folder: Path) -> Engine:
    from engine_openvino import OpenVino

    return OpenVino(model)


PEERS: dict[str, tuple[str, Callable[[Transformer, Path], Engine]]] = {
    "llama.cpp Q8_0": ("llama_cpp", _llama_cpp),
    "ik_llama.cpp Q8_0_R8": ("ik_llama_cpp", _ik_llama),
    "GenAI INT8": ("onnxruntime_genai", _genai),
    "OpenVINO INT8": ("openvino", _openvino),
}
"""The package and the maker of each peer, by its name in the table."""
