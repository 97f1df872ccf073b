"""An ONNX file whose numbers are all fp16, and the check of what a chip that has only those sees.

    to_fp16            weights, cache and every operator in fp16; only the logits leave it in fp32
    round_everything   the same file in fp32, but each result of each operator goes through fp16

The second needs no fp16 arithmetic: ONNX Runtime on a CPU computes many fp16 operators in fp32, so
the first would hide there an overflow that a chip has. A plain RMSNorm squares its input, and 256
is already too much for fp16: `to_fp16` gives it the form of `model.norm.fp16_safe_rms_norm`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.export.onnx import LOGITS, load_proto, save_proto

LARGEST = float(np.finfo(np.float16).max)
SMALLEST = 2.0**-24
_ONE = "fp16_safe_one"


def as_fp16(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Return x rounded to fp16; finite numbers stay finite, and what is not 0 does not become it.

    A mask of -3.4e38 would else become -inf, an epsilon of 1e-8 nothing.

    >>> as_fp16(np.array([-3e38, 1e-9, 1.0], np.float32)).tolist()
    [-65504.0, 5.960464477539063e-08, 1.0]
    """
    clipped = np.where(np.isfinite(x), np.clip(x, -LARGEST, LARGEST), x)
    half = clipped.astype(np.float16)
    lost = (half == 0) & (x != 0)
    return np.where(lost, np.copysign(np.float16(SMALLEST), half), half)


def to_fp16(source: Path, target: Path) -> None:
    """Write a float file with fp16 weights, cache and arithmetic; the logits stay fp32.

    Raises:
        ArtifactError: the source is damaged.
    """
    import onnx

    proto = load_proto(source)
    graph = proto.graph
    make_norms_safe(graph)
    for tensor in _float_tensors(graph):
        half = as_fp16(onnx.numpy_helper.to_array(tensor))
        tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.FLOAT16
        node.output[:] = [f"{name}_fp16" if name == LOGITS else name for name in node.output]
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type
        if value.name != LOGITS and kind.elem_type == onnx.TensorProto.FLOAT:
            kind.elem_type = onnx.TensorProto.FLOAT16
    graph.node.append(_cast(f"{LOGITS}_fp16", LOGITS, onnx.TensorProto.FLOAT))
    save_proto(proto, target)


def round_everything(source: Path, target: Path) -> None:
    """Write a float file that rounds its weights and every result of every operator to fp16.

    Raises:
        ArtifactError: the source is damaged.
    """
    import onnx

    proto = load_proto(source)
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
    floats = {
        value.name
        for value in (*graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    for tensor in _float_tensors(proto.graph):
        rounded = as_fp16(onnx.numpy_helper.to_array(tensor)).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(rounded, tensor.name))
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    for node in nodes:
        results = [name for name in node.output if name in floats]
        node.output[:] = [f"{name}_wide" if name in floats else name for name in node.output]
        proto.graph.node.append(node)
        for name in results:
            half = _cast(f"{name}_wide", f"{name}_half", onnx.TensorProto.FLOAT16)
            back = _cast(f"{name}_half", name, onnx.TensorProto.FLOAT)
            proto.graph.node.extend((half, back))
    save_proto(proto, target)


def make_norms_safe(graph: Any) -> None:
    """Let every RMSNorm divide by its largest magnitude before it squares, if that is above 1.

    One that is an operator of its own (opset 23) computes in fp32 inside, and so does LayerNorm.
    """
    import onnx

    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    safe: list[Any] = []
    for node in graph.node:
        mean, *others = users.get(node.output[0], [None])
        if node.op_type == "Pow" and not others and mean and mean.op_type == "ReduceMean":
            x, (add,) = node.input[0], users[mean.output[0]]
            prefix, axes = f"{node.output[0]}_safe", mean.input[1]
            safe += [
                onnx.helper.make_node("Abs", [x], [f"{prefix}_abs"]),
                onnx.helper.make_node("ReduceMax", [f"{prefix}_abs", axes], [f"{prefix}_max"]),
                onnx.helper.make_node("Max", [f"{prefix}_max", _ONE], [f"{prefix}_scale"]),
                onnx.helper.make_node("Div", [x, f"{prefix}_scale"], [f"{prefix}_x"]),
                onnx.helper.make_node("Div", [add.input[1], f"{prefix}_scale"], [f"{prefix}_eps"]),
                onnx.helper.make_node(
                    "Div", [f"{prefix}_eps", f"{prefix}_scale"], [f"{prefix}_eps2"]
                ),
            ]
            (root,) = users[add.output[0]]
            (inverse,) = users[root.output[0]]
            (product,) = users[inverse.output[0]]
            add.input[1] = f"{prefix}_eps2"
            for part in (node, product):
                part.input[:] = [f"{prefix}_x" if name == x else name for name in part.input]
        safe.append(node)
    graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), _ONE))
    del graph.node[:]
    graph.node.extend(safe)


def _float_tensors(graph: Any) -> Iterator[Any]:
    """Yield the fp32 tensors that a graph stores: weights, and constants of nodes."""
    import onnx

    attributes = (attribute for node in graph.node for attribute in node.attribute)
    for tensor in (*graph.initializer, *(a.t for a in attributes if a.HasField("t"))):
        if tensor.data_type == onnx.TensorProto.FLOAT:
            yield tensor


def _cast(source: str, target: str, kind: int) -> Any:
    import onnx

    return onnx.helper.make_node("Cast", [source], [target], to=kind)
