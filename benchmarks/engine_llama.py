"""llama.cpp and its fork ik_llama.cpp for decode.py, by their low-level calls, from one file."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import MAX_LEN, Logits

from tinyllm.model.transformer import Transformer


class LlamaCpp:
    """llama.cpp by its low-level calls, defaults but for the threads."""

    note = ""

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


class IkLlama:
    """ik_llama.cpp, whose loader interleaves the rows of Q8_0 matrices (R8)."""

    def __init__(self, path: Path) -> None:
        from ik_llama_cpp import _ctypes_api as api

        self._api: Any = api
        self._library: Any = api._lib
        # PyPI's wheel is compiled for AVX2; the engine can do more, so the name says it
        self.note = "" if self._library.ggml_cpu_has_avx512() else ", AVX2"
        self._keep_quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
            lambda *_: None
        )
        self._library.llama_log_set(self._keep_quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        loading = api.llama_model_default_params()
        loading.repack_tensors = True
        loading.use_mmap = False  # mapped weights are not repacked
        model = api.llama_model_load_from_file(str(path).encode(), loading)
        parameters = api.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = MAX_LEN
        parameters.flash_attn = False  # at this length it costs 0 to 20 % of a prompt
        self._context = ctypes.c_void_p(api.llama_init_from_model(model, parameters))
        self._n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._batch = api.llama_batch_init(MAX_LEN, 0, 1)
        for i in range(MAX_LEN):
            self._batch.n_seq_id[i], self._batch.seq_id[i][0] = 1, 0
        self.clear()

    def set_threads(self, n: int) -> None:
        """See `Engine`."""
        self._library.llama_set_n_threads(self._context, n, n)

    def clear(self) -> None:
        """See `Engine`."""
        self._api.llama_kv_cache_clear(self._context)
        self._n = 0

    def read(self, ids: list[int]) -> Logits:
        """See `Engine`."""
        batch, n = self._batch, len(ids)
        batch.n_tokens = n
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, self._n + i, i == n - 1
        if code := self._api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        self._n += n
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, shape=(self._n_vocab,))


def gguf_q8(model: Transformer, folder: Path) -> Path:
    """Return a file of the weights as llama.cpp wants them, written if it does not exist.

    Matrices are Q8_0, rotary pairs lie side by side.
    """
    import gguf

    path, config = folder / "model.gguf", model.config
    if path.exists():
        return path
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
    return path
