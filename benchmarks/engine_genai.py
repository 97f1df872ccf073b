"""ONNX Runtime GenAI for decode.py: a graph of the operators that its own model builder takes.

Per layer: one product for queries, keys and values, `GroupQueryAttention` with rotation and cache
inside, one product for gate and up, norms fused with the residual sum; 8-bit weights in blocks
(`MatMulNBits`); the head sees the last position only. The package's model builder (`-p int8`, with
`accuracy_level=4 prune_lm_head=true fuse_mlp_gate_up=true`) writes the same nodes and is as fast,
but takes 20 s to start.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import Logits
from onnx import TensorProto, helper, numpy_helper, save

from tinyllm.export.genai import GENAI_CONFIG, genai_config
from tinyllm.export.onnx_int8 import INT8_ACTIVATIONS
from tinyllm.model.sizes import ModelConfig
from tinyllm.model.transformer import Transformer

GRAPH = "model.onnx"
CONTRIB = "com.microsoft"
BLOCK = 256
"""Weights to a scale. The largest is the fastest: at d 768 a prompt at 1.5 and a token at 1.6 times
the speed of blocks of 32 (one thread), and still no further off than one scale per row."""


class Genai:
    """The model in GenAI; one session per number of threads, which a session cannot change."""

    note = ""

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai

        self._api, self._folder = onnxruntime_genai, folder
        self._models: dict[int, Any] = {}
        self.set_threads(1)

    def set_threads(self, n: int) -> None:
        """See `Engine`."""
        if n not in self._models:
            options = {"intra_op_num_threads": n, "inter_op_num_threads": 1}
            config = self._api.Config(str(self._folder))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._models[n] = self._api.Model(config)
        self._model = self._models[n]
        self.clear()

    def clear(self) -> None:
        """See `Engine`."""
        parameters = self._api.GeneratorParams(self._model)
        self._generator = self._api.Generator(self._model, parameters)

    def read(self, ids: list[int]) -> Logits:
        """See `Engine`."""
        self._generator.append_tokens(np.array(ids, np.int32))
        logits: Logits = self._generator.get_logits()[0, -1]
        return logits


def write_genai(model: Transformer, folder: Path) -> Path:
    """Write graph and configuration of a float model into a new folder; return it."""
    content = genai_config(model.config, GRAPH)
    del content["model"]["decoder"]["inputs"]["position_ids"]  # the attention counts by itself
    content["search"]["past_present_share_buffer"] = True
    folder.mkdir()
    (folder / GENAI_CONFIG).write_text(json.dumps(content))
    save(_Graph(model.config).build(model), folder / GRAPH)
    return folder


class _Graph:
    """Nodes and weights, in the order in which they are added."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._nodes: list[Any] = []
        self._stored: list[Any] = []

    def build(self, model: Transformer) -> Any:
        """Return the whole graph."""
        table = self._store("table", model.embed_tokens.weight)
        angles = [self._store(n, getattr(model, n)) for n in ("rope_cos", "rope_sin")]
        lengths = self._lengths()
        x = self._add("Gather", [table, "input_ids"], "x")
        y = ""
        blocks: list[Any] = list(model.layers)
        for i, block in enumerate(blocks):
            attention, mlp = block.self_attn, block.mlp
            x, h = self._norm(x, y, block.input_layernorm, f"{i}.attention")
            qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
            h = self._matrix(h, torch.cat(qkv), f"{i}.qkv")
            h = self._attend(h, i, lengths, angles)
            y = self._matrix(h, attention.o_proj.weight, f"{i}.o")
            x, h = self._norm(x, y, block.post_attention_layernorm, f"{i}.mlp")
            both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            h = self._matrix(h, both, f"{i}.gate_up")
            gate, up = f"{i}.gate", f"{i}.up"
            self._nodes.append(helper.make_node("Split", [h], [gate, up], axis=-1, num_outputs=2))
            sigmoid = self._add("Sigmoid", [gate], f"{i}.sigmoid")
            silu = self._add("Mul", [gate, sigmoid], f"{i}.silu")
            h = self._add("Mul", [silu, up], f"{i}.product")
            y = self._matrix(h, mlp.down_proj.weight, f"{i}.down")
        _, h = self._norm(x, y, model.norm, "final")
        h = self._add("Gather", [h, self._store("last", np.array([-1]))], "h_last", axis=1)
        self._matrix(h, model.embed_tokens.weight, "head", result="logits")
        graph = helper.make_graph(self._nodes, "model", *self._surface(), self._stored)
        opsets = [helper.make_opsetid("", 22), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def _lengths(self) -> list[str]:
        """Return the cached length of each sequence less 1, and the longest, as int32."""
        one = self._store("one", np.array([1]))
        total = self._add("ReduceSum", ["attention_mask", one], "total", keepdims=0)
        shape = self._add("Shape", ["attention_mask"], "shape")
        found = {
            "n_before": self._add("Sub", [total, one], "before"),
            "n_total": self._add("Gather", [shape, self._store("axis", np.array(1))], "length"),
        }
        return [self._add("Cast", [x], n, to=TensorProto.INT32) for n, x in found.items()]

    def _norm(self, x: str, y: str, norm: Any, name: str) -> tuple[str, str]:
        """Return x + y, and its norm; y may be absent."""
        gain = self._store(f"{name}.gain", norm.weight)
        result, eps = f"{name}.normed", self._config.norm_eps
        if not y:
            kind = "SimplifiedLayerNormalization"
            return x, self._add(kind, [x, gain], result, epsilon=eps, axis=-1, stash_type=1)
        kind, total = "SkipSimplifiedLayerNormalization", f"{name}.sum"
        node = helper.make_node(
            kind, [x, y, gain], [result, "", "", total], domain=CONTRIB, epsilon=eps
        )
        self._nodes.append(node)
        return total, result

    def _attend(self, qkv: str, i: int, lengths: list[str], angles: list[str]) -> str:
        """Return what layer i's heads found."""
        past = [f"past_key_values.{i}.{part}" for part in ("key", "value")]
        present = [f"present.{i}.{part}" for part in ("key", "value")]
        node = helper.make_node(
            "GroupQueryAttention",
            [qkv, "", "", *past, *lengths, *angles],
            [f"{i}.heads", *present],
            domain=CONTRIB,
            num_heads=self._config.n_heads,
            kv_num_heads=self._config.n_kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
        )
        self._nodes.append(node)
        return f"{i}.heads"

    def _matrix(self, x: str, weight: torch.Tensor, name: str, result: str = "") -> str:
        """Return the product with a matrix (N, K), rounded in blocks."""
        n, k = weight.shape
        padded = np.pad(weight.detach().numpy(), ((0, 0), (0, -k % BLOCK)))
        blocks = padded.reshape(n, -1, BLOCK)
        scale = np.abs(blocks).max(axis=2) / np.float32(127)
        rounded = (np.rint(blocks / scale[..., None]) + 128).astype(np.uint8)
        stored = [self._store(f"{name}.q", rounded), self._store(f"{name}.scale", scale)]
        sizes: dict[str, Any] = {"K": k, "N": n, "bits": 8, "block_size": BLOCK}
        node = helper.make_node(
            "MatMulNBits",
            [x, *stored],
            [result or f"{name}.out"],
            domain=CONTRIB,
            accuracy_level=INT8_ACTIVATIONS,
            **sizes,
        )
        self._nodes.append(node)
        return result or f"{name}.out"

    def _add(self, kind: str, inputs: list[str], result: str, **attributes: Any) -> str:
        """Add a node of the standard's operators; return its result's name."""
        self._nodes.append(helper.make_node(kind, inputs, [result], **attributes))
        return result

    def _store(self, name: str, array: Any) -> str:
        """Keep a weight; return its name."""
        array = array.detach().numpy() if isinstance(array, torch.Tensor) else array
        self._stored.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _surface(self) -> tuple[list[Any], list[Any]]:
        """Return inputs and outputs."""
        config, tensor = self._config, helper.make_tensor_value_info
        inputs = [
            tensor("input_ids", TensorProto.INT64, ["batch", "seq"]),
            tensor("attention_mask", TensorProto.INT64, ["batch", "total"]),
        ]
        outputs = [tensor("logits", TensorProto.FLOAT, ["batch", 1, config.vocab_size])]
        for i in range(config.n_layers):
            for part in ("key", "value"):
                shape: list[Any] = ["batch", config.n_kv_heads, "past", config.d_head]
                inputs.append(tensor(f"past_key_values.{i}.{part}", TensorProto.FLOAT, shape))
                shape = ["batch", config.n_kv_heads, "total", config.d_head]
                outputs.append(tensor(f"present.{i}.{part}", TensorProto.FLOAT, shape))
        return inputs, outputs
