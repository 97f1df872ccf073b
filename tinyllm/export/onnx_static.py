"""A model as two ONNX files in which every size is a number: for chips that take no other.

`prefill.onnx` reads a chunk of T tokens, `decode.onnx` one. Both take `input_ids` (1, T),
`position` (1,), the place of the first of them, and per layer the whole cache,
`past_key_values.N.key` and `.value` (1, G, S, K); S is the model's context. Slot s belongs to
position s, so the mask follows from the position: slots behind it are not looked at, whatever they
hold. The cache is written in one of two ways:

    host    outputs `new.N.key` and `.value` (1, G, T, K); the caller copies them to its buffer
    graph   outputs `present.N.key` and `.value` (1, G, S, K), the cache with them in place

A chunk may be filled up with any tokens at its end: what they write is overwritten before a
position looks at it. Masks are finite numbers, and RMSNorm has the form that fp16 holds.
Dimensions: T new positions, S slots, G key-value heads, K head width.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm.errors import DataError
from tinyllm.export.onnx import LOGITS, LayerPast, past_names, present_names, write_graph
from tinyllm.model.norm import make_fp16_safe
from tinyllm.model.transformer import Transformer

CacheWrite = Literal["host", "graph"]
PREFILL, DECODE = "prefill.onnx", "decode.onnx"
HIDDEN = -1e4
"""Added to the score of a slot that is not looked at: fp16 holds it, and its exponential is 0."""

FAR = 2**30
"""A position that nothing looks at."""

OPERATORS = frozenset(
    {
        *("Abs", "Add", "Div", "Mul", "Pow", "Reciprocal", "Sqrt", "Sub"),
        *("Gelu", "Max", "Relu", "Sigmoid", "Softmax"),
        *("LayerNormalization", "MatMul", "ReduceMax", "ReduceMean"),
        *("Concat", "Gather", "Reshape", "Slice", "Split", "Transpose", "Unsqueeze"),
        *("And", "Cast", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Where"),
    }
)
"""All that the files hold: arithmetic, layout, tables and choices. No loops, no scatters, no shapes
that are computed, no operator of a runtime of its own."""


def new_names(n_layers: int) -> list[str]:
    """Return the names of the new keys and values, in the order of `past_names`."""
    return [name.replace("present", "new") for name in present_names(n_layers)]


def export_static(
    model: Transformer, directory: Path, *, opset: int, chunk: int, writes: CacheWrite
) -> None:
    """Write both files; the same model gives the same bytes.

    Args:
        model: in fp32 on the CPU, in evaluation mode.
        directory: exists.
        opset: version of the operator set.
        chunk: tokens that the prefill file reads at once.
        writes: who writes the cache.

    Raises:
        DataError: the chunk is longer than the context, or the weights do not fit into one file.
    """
    config = model.config
    if chunk > config.max_seq_len:
        raise DataError(
            f"{directory}: a chunk of {chunk} tokens is longer than the context of"
            f" {config.max_seq_len}; take a smaller export.static_chunk"
        )
    model = copy.deepcopy(model)
    make_fp16_safe(model)
    n_heads, d_k, d_v = config.cached
    shape = 1, n_heads, config.max_seq_len
    past = [(torch.zeros(*shape, d_k), torch.zeros(*shape, d_v)) for _ in range(config.n_layers)]
    written = new_names if writes == "host" else present_names
    for name, n_new in ((PREFILL, chunk), (DECODE, 1)):
        ids, position = torch.zeros(1, n_new, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        proto = write_graph(
            _Static(model, n_new, writes),
            (ids, position, past),
            directory / name,
            opset,
            input_names=["input_ids", "position", *past_names(config.n_layers)],
            output_names=[LOGITS, *written(config.n_layers)],
        )
        if problems := static_problems(proto):
            raise DataError(f"{directory / name}: not for chips with fixed shapes: {problems[0]}")


def static_problems(proto: Any) -> list[str]:
    """Return what a chip with fixed shapes could not take, one line each.

    Args:
        proto: an ONNX model.
    """
    import onnx

    unknown = sorted({node.op_type for node in proto.graph.node} - OPERATORS)
    problems = [f"operator {name} is none of those that such chips have" for name in unknown]
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
    known = {value.name: value.type.tensor_type for value in graph.value_info}
    known |= {v.name: v.type.tensor_type for v in (*graph.input, *graph.output)}
    for name in [*known, *(out for node in graph.node for out in node.output if out not in known)]:
        dims = known[name].shape.dim if name in known else None
        if dims is None or not all(dim.HasField("dim_value") for dim in dims):
            problems.append(f"{name} has no fixed shape")
    return problems


class _HostLayer:
    """A `LayerCache` that the caller writes: attention sees all slots, then the new positions."""

    def __init__(self, past: LayerPast) -> None:
        self._past = past

    def append(self, k_1GTK: Tensor, v_1GTK: Tensor) -> tuple[Tensor, Tensor]:
        """Return slots and new keys and values, both (1, G, S + T, K)."""
        self.k, self.v = k_1GTK, v_1GTK
        return torch.cat((self._past[0], k_1GTK), 2), torch.cat((self._past[1], v_1GTK), 2)


class _GraphLayer:
    """A `LayerCache` that is written here: attention sees all slots."""

    def __init__(self, past: LayerPast, place_ST: Tensor, is_new_S1: Tensor) -> None:
        self._past, self._place_ST, self._is_new_S1 = past, place_ST, is_new_S1

    def append(self, k_1GTK: Tensor, v_1GTK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slots with the new keys and values in place, both (1, G, S, K)."""
        self.k, self.v = self._put(self._past[0], k_1GTK), self._put(self._past[1], v_1GTK)
        return self.k, self.v

    def _put(self, old_1GSK: Tensor, new_1GTK: Tensor) -> Tensor:
        """Return the slots with the new rows at their places.

        A product with one-hot rows and a choice, in place of a scatter, which fewer chips have.
        """
        one = new_1GTK.shape[2] == 1
        rows = new_1GTK if one else self._place_ST.to(new_1GTK.dtype) @ new_1GTK
        return torch.where(self._is_new_S1, rows, old_1GSK)


class _Static(nn.Module):
    """The model over T new tokens and a cache of fixed size."""

    def __init__(self, model: Transformer, n_new: int, writes: CacheWrite) -> None:
        super().__init__()
        self.model, self.n_new, self.writes = model, n_new, writes

    def forward(
        self, input_ids: Tensor, position: Tensor, past: Sequence[LayerPast]
    ) -> tuple[Tensor, list[LayerPast]]:
        """Return the logits (1, T, V), and each layer's new keys and values, or all slots.

        Args:
            input_ids: (1, T), int32.
            position: (1,), int32: where the first of them stands.
            past: keys and values (1, G, S, K) of each layer.
        """
        model, config = self.model, self.model.config
        positions_T = position + torch.arange(self.n_new, dtype=torch.int32)
        # `rope_cos[positions_T]` would become a GatherND
        cos, sin = (F.embedding(positions_T, t) for t in (model.rope_cos, model.rope_sin))
        x = model.embed_tokens(input_ids)
        if model.embed_positions is not None:
            x = x + model.embed_positions(positions_T)
        slots_S = torch.arange(config.max_seq_len, dtype=torch.int32)
        layers: list[Any] = [_HostLayer(layer) for layer in past]
        if self.writes == "graph":
            place_ST = slots_S[:, None] == positions_T
            is_new_S1 = ((slots_S >= position) & (slots_S < position + self.n_new))[:, None]
            layers = [_GraphLayer(layer, place_ST, is_new_S1) for layer in past]
        whole = self._bias(slots_S, positions_T, None)
        narrow = self._bias(slots_S, positions_T, config.window)
        for i, (block, layer) in enumerate(zip(model.layers, layers, strict=True)):
            bias = narrow if i in config.window_layers else whole
            x = block(x, cos, sin, bias, None, layer)
        return model.head(model.norm(x)), [(layer.k, layer.v) for layer in layers]

    def _bias(self, slots_S: Tensor, positions_T: Tensor, window: int | None) -> Tensor:
        """Return 0 where a position looks, else `HIDDEN`; (T, S), or (T, S + T) on the host."""
        columns, rows_T1 = slots_S, positions_T[:, None]
        if self.writes == "host":  # slots before the chunk, then the chunk itself
            before = slots_S < positions_T[:1]
            columns = torch.cat((torch.where(before, slots_S, FAR), positions_T))
        seen = columns <= rows_T1
        if window is not None:
            seen = seen & (columns > rows_T1 - window)
        return torch.where(seen, 0.0, HIDDEN)
