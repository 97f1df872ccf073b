"""The engines that decode.py compares: one interface, the same random weights."""

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from tinyllm.inference.cache import KVCache
from tinyllm.inference.generate import cache_dtype
from tinyllm.model.init import build_model
from tinyllm.model.sizes import ModelConfig
from tinyllm.model.transformer import Transformer
from tinyllm.quantization.int8 import quantize_model

Logits = npt.NDArray[np.float32]
MAX_LEN = 256


class Engine(Protocol):
    """A model with one sequence in its cache."""

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

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._cache = KVCache(model.config, 1, MAX_LEN, cache_dtype(model), "cpu")

    def set_threads(self, n: int) -> None:
        """See `Engine`."""
        torch.set_num_threads(n)

    def clear(self) -> None:
        """See `Engine`."""
        self._cache.truncate(0)

    def read(self, ids: list[int]) -> Logits:
        """See `Engine`."""
        with torch.inference_mode():
            logits = self._model.next_logits(torch.tensor([ids]), self._cache)[0]
        return logits.numpy() if logits.dtype is torch.float32 else logits.float().numpy()


class LlamaCpp:
    """llama.cpp by its low-level calls, defaults but for the threads."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        self._keep_quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._keep_quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._api: Any = llama_cpp
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = MAX_LEN
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def set_threads(self, n: int) -> None:
        """See `Engine`."""
        self._api.llama_set_n_threads(self._context, n, n)

    def clear(self) -> None:
        """See `Engine`."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def read(self, ids: list[int]) -> Logits:
        """See `Engine`."""
        tokens = (self._api.llama_token * len(ids))(*ids)
        code = self._api.llama_decode(
            self._context, self._api.llama_batch_get_one(tokens, len(ids))
        )
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, shape=(self._n_vocab,))


def write_gguf_q8(model: Transformer, path: Path) -> None:
    """Write a model's weights as llama.cpp wants them: Q8_0 matrices, rotary pairs side by side."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_rope_dimension_count(config.d_head)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    q8 = gguf.GGMLQuantizationType.Q8_0

    def pairs(w: torch.Tensor) -> torch.Tensor:
        return w.view(-1, 2, config.d_head // 2, config.d).transpose(1, 2).reshape(w.shape)

    def matrix(name: str, w: torch.Tensor) -> None:
        blocks = gguf.quants.quantize(w.detach().numpy(), q8)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=q8)

    def norm(name: str, w: torch.Tensor) -> None:
        writer.add_tensor(f"{name}.weight", w.detach().numpy())

    matrix("token_embd", model.embed_tokens.weight)
    norm("output_norm", model.norm.weight)
    blocks: list[Any] = list(model.layers)
    for i, block in enumerate(blocks):
        attention, mlp = block.self_attn, block.mlp
        norm(f"blk.{i}.attn_norm", block.input_layernorm.weight)
        norm(f"blk.{i}.ffn_norm", block.post_attention_layernorm.weight)
        matrix(f"blk.{i}.attn_q", pairs(attention.q_proj.weight))
        matrix(f"blk.{i}.attn_k", pairs(attention.k_proj.weight))
        matrix(f"blk.{i}.attn_v", attention.v_proj.weight)
        matrix(f"blk.{i}.attn_output", attention.o_proj.weight)
        matrix(f"blk.{i}.ffn_gate", mlp.gate_proj.weight)
        matrix(f"blk.{i}.ffn_up", mlp.up_proj.weight)
        matrix(f"blk.{i}.ffn_down", mlp.down_proj.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build_engines(config: ModelConfig, folder: Path) -> dict[str, Engine | None]:
    """Return every engine by its name, None for those that are not installed."""
    model = build_model(config, seed=0).eval().requires_grad_(False)
    engines: dict[str, Engine | None] = {"ours INT8": Ours(quantize_model(model))}
    makers: dict[str, tuple[str, Callable[[], Engine]]] = {
        "llama.cpp Q8_0": ("llama_cpp", lambda: _llama_cpp(model, folder)),
    }
    for name, (package, make) in makers.items():
        engines[name] = make() if importlib.util.find_spec(package) else None
    engines["torch bf16"] = Ours(model.bfloat16())
    return engines


def _llama_cpp(model: Transformer, folder: Path) -> LlamaCpp:
    """Write the weights and open them."""
    path = folder / "model.gguf"
    write_gguf_q8(model, path)
    return LlamaCpp(path)
