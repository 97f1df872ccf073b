"""An ONNX file with 8-bit weights in the standard's own operators, made from the float one.

Every stored matrix becomes int8 with one scale per output, and a `DequantizeLinear` in front of its
product: the form (QDQ) that converters of other runtimes and chips read. `MatMulNBits` of
`onnx_int8.py` is ONNX Runtime's own; it is faster there.

Activations stay float. Their scales would have to be fixed too, from runs over sample text, and are
the chip's business: its compiler knows which widths it multiplies, and calibrates with text of its
own. Nothing has to be calibrated here, so the same model gives the same bytes.
"""

from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.export.onnx import load_proto, quiet, save_proto
from tinyllm.export.onnx_int8 import untie_head

LARGEST = 127
"""Symmetric: -128 is not used, and the zero point is 0."""


def quantize_qdq(source: Path, target: Path) -> None:
    """Write the QDQ form of a float ONNX file; the embedding table stays in fp32.

    Raises:
        ArtifactError: the source is damaged.
    """
    with quiet():
        from onnx import helper, numpy_helper

        proto = load_proto(source)
        graph = proto.graph
        untie_head(graph)
        stored = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
        nodes: list[Any] = []
        for node in graph.node:
            if node.op_type == "MatMul" and node.input[1] in stored:
                name = node.input[1]
                matrix_KN = numpy_helper.to_array(stored[name])
                scales_N = np.abs(matrix_KN).max(axis=0) / LARGEST
                scales_N = np.where(scales_N == 0, 1, scales_N).astype(np.float32)
                rounded_KN = np.rint(matrix_KN / scales_N).astype(np.int8)
                graph.initializer.remove(stored.pop(name))
                for part, array in (("int8", rounded_KN), ("scale", scales_N)):
                    graph.initializer.append(numpy_helper.from_array(array, f"{name}_{part}"))
                parts = [f"{name}_int8", f"{name}_scale"]
                nodes.append(helper.make_node("DequantizeLinear", parts, [name], axis=1))
            nodes.append(node)
        del graph.node[:]
        graph.node.extend(nodes)
        save_proto(proto, target)
