"""OpenVINO for decode.py: the model in its own operators, with INT8 weights and a cache inside.

The shapes of nodes are those that the CPU plugin joins: RMSNorm, rotation, attention with its
cache (`ReadValue`, `Gather`, `Concat`), and products with weights that are stored as INT8 with one
scale per output, for which it rounds the input in groups at run time. That is what a model
converted with INT8_SYM weights consists of; the head sees the last position only.
"""

from typing import Any

import numpy as np
import openvino
import torch
from engines import Logits
from openvino import opset13 as ops

from tinyllm.model.sizes import ModelConfig
from tinyllm.model.transformer import Transformer

OPTIONS = {
    "PERFORMANCE_HINT": "LATENCY",
    "ENABLE_CPU_PINNING": False,  # pinned threads wait for their core: 1.2 to 7 times slower
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128",  # 32 by default; a prompt takes 0.7 of its time
}
"""Measured at d 256 (pinning, a busy machine: best and twentieth percentile of 1,080 tokens), d 768
and d 1024 (groups)."""
END = np.iinfo(np.int64).max


class OpenVino:
    """The model in OpenVINO; compiled once per number of threads."""

    note = ""

    def __init__(self, model: Transformer) -> None:
        self._model, self._core = _Graph(model.config).build(model), openvino.Core()
        self._requests: dict[int, Any] = {}
        self.set_threads(1)

    def set_threads(self, n: int) -> None:
        """See `Engine`."""
        if n not in self._requests:
            options = {**OPTIONS, "INFERENCE_NUM_THREADS": n}
            compiled = self._core.compile_model(self._model, "CPU", options)
            self._requests[n] = compiled.create_infer_request()
            self._requests[n].set_tensor("beam", openvino.Tensor(np.zeros(1, np.int32)))
        self._request = self._requests[n]
        self.clear()

    def clear(self) -> None:
        """See `Engine`."""
        self._request.reset_state()
        self._n = 0
        self._inputs = np.zeros((2, 1, 0), np.int64)

    def read(self, ids: list[int]) -> Logits:
        """See `Engine`."""
        n = len(ids)
        if n != self._inputs.shape[2]:  # else the request still reads from the same memory
            self._inputs = np.zeros((2, 1, n), np.int64)
            for name, array in zip(("ids", "positions"), self._inputs, strict=True):
                self._request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        self._inputs[0, 0], self._inputs[1, 0] = ids, range(self._n, self._n + n)
        self._n += n
        self._request.infer()
        logits: Logits = self._request.get_output_tensor().data[0, -1]
        return logits


class _Graph:
    """Nodes of one model."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._sinks: list[Any] = []

    def build(self, model: Transformer) -> Any:
        """Return the whole graph: `ids` (1, T) and `positions` (T) to logits (1, 1, V)."""
        ids = ops.parameter([-1, -1], np.int64, name="ids")
        positions = ops.parameter([-1, -1], np.int64, name="positions")
        self._beam = ops.parameter([-1], np.int32, name="beam")
        n_rows = ops.gather(ops.shape_of(ids), [0], 0)
        empty = ops.concat([n_rows, np.array([self._config.n_kv_heads, 0, self._config.d_head])], 0)
        self._nothing = ops.broadcast(np.float32(0), empty)
        self._turns = [
            ops.unsqueeze(ops.gather(_constant(table.repeat(1, 2)), positions, 0), [1])
            for table in (model.rope_cos, model.rope_sin)
        ]
        x = ops.gather(_int8(model.embed_tokens.weight), ids, 0)
        blocks: list[Any] = list(model.layers)
        for i, block in enumerate(blocks):
            x = ops.add(x, self._attend(self._norm(x, block.input_layernorm), block.self_attn, i))
            h = self._norm(x, block.post_attention_layernorm)
            gate = ops.swish(_linear(h, block.mlp.gate_proj.weight))
            up = _linear(h, block.mlp.up_proj.weight)
            x = ops.add(x, _linear(ops.multiply(gate, up), block.mlp.down_proj.weight))
        last = ops.slice(x, [-1], [END], [1], [1])
        logits = _linear(self._norm(last, model.norm), model.embed_tokens.weight)
        parameters = [ids, positions, self._beam]
        for parameter in parameters:
            parameter.output(0).tensor.set_names({parameter.friendly_name})
        return openvino.Model([ops.result(logits)], self._sinks, parameters, "model")

    def _norm(self, x: Any, norm: Any) -> Any:
        """Return an RMSNorm."""
        squares = ops.reduce_mean(ops.power(x, np.float32(2)), [-1], keep_dims=True)
        root = ops.sqrt(ops.add(squares, np.float32(self._config.norm_eps)))
        return ops.multiply(
            ops.multiply(x, ops.divide(np.float32(1), root)), _constant(norm.weight)
        )

    def _attend(self, x: Any, attention: Any, layer: int) -> Any:
        """Return what a layer's heads found."""
        config = self._config
        q = self._turned(self._heads(_linear(x, attention.q_proj.weight), config.n_heads))
        k = self._turned(self._heads(_linear(x, attention.k_proj.weight), config.n_kv_heads))
        v = self._heads(_linear(x, attention.v_proj.weight), config.n_kv_heads)
        k, v = self._cached(k, f"{layer}.key"), self._cached(v, f"{layer}.value")
        heads = ops.scaled_dot_product_attention(q, k, v, causal=True)
        joined = ops.reshape(ops.transpose(heads, [0, 2, 1, 3]), [0, 0, -1], special_zero=True)
        return _linear(joined, attention.o_proj.weight)

    def _heads(self, x: Any, n: int) -> Any:
        """Return (1, T, n K) as (1, n, T, K)."""
        apart = ops.reshape(x, [0, 0, n, self._config.d_head], special_zero=True)
        return ops.transpose(apart, [0, 2, 1, 3])

    def _turned(self, x: Any) -> Any:
        """Return queries or keys at their positions."""
        cos, sin = self._turns
        half = self._config.d_head // 2
        first = ops.slice(x, [0], [half], [1], [3])
        second = ops.slice(x, [half], [END], [1], [3])
        across = ops.concat([ops.multiply(second, np.float32(-1)), first], -1)
        return ops.add(ops.multiply(x, cos), ops.multiply(across, sin))

    def _cached(self, new: Any, name: str) -> Any:
        """Return earlier and new keys or values; the state keeps both."""
        shape = [-1, self._config.n_kv_heads, -1, self._config.d_head]
        past = ops.read_value(self._nothing, name, np.float32, shape)
        whole = ops.concat([ops.gather(past, self._beam, 0), new], 2)
        self._sinks.append(ops.assign(whole, name))
        return whole


def _linear(x: Any, weight: torch.Tensor) -> Any:
    """Return x W^T with W in INT8."""
    return ops.matmul(x, _int8(weight), False, True)


def _int8(weight: torch.Tensor) -> Any:
    """Return a matrix as INT8 with one scale per row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    rounded = torch.round(weight / scale).to(torch.int8)
    return ops.multiply(ops.convert(_constant(rounded), "f32"), _constant(scale))


def _constant(tensor: torch.Tensor) -> Any:
    return ops.constant(tensor.detach().contiguous().numpy())
