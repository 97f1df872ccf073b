"""An ONNX file with 8-bit weights in the standard's own operators, made from the float one.

Every stored matrix becomes int8 with one scale per output and block of 32 inputs, and a
`DequantizeLinear` in front of its product: the form (QDQ) that converters of other runtimes and
chips read; blocks need operator set 21. The numbers are about those of `onnx_int8.py`, whose
operator is ONNX Runtime's own. One scale per output would do without blocks, but is coarser: of a
trained model's 768 likeliest tokens on held-out text 98.6 % stayed, with blocks 99.2 %.

Activations stay float. Their scales would have to be fixed too, from runs over sample text, and are
the chip's business: its compiler knows which widths it multiplies, and calibrates with text of its
own. Nothing has to be calibrated here, so the same model gives the same bytes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.export.onnx import load_proto, quiet, save_proto
from tinyllm.export.onnx_int8 import BLOCK, untie_head

OPSET = 21
"""The first with blocks in `DequantizeLinear`; all other operators mean the same as in 18 to 20."""
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
                rounded_KN, scales_BN = _round_blocks(numpy_helper.to_array(stored[name]))
                graph.initializer.remove(stored.pop(name))
                for part, array in (("int8", rounded_KN), ("scale", scales_BN)):
                    graph.initializer.append(numpy_helper.from_array(array, f"{name}_{part}"))
                parts = [f"{name}_int8", f"{name}_scale"]
                nodes.append(
                    helper.make_node("DequantizeLinear", parts, [name], axis=0, block_size=BLOCK)
                )
            nodes.append(node)
        del graph.node[:]
        graph.node.extend(nodes)
        (opset,) = (imported for imported in proto.opset_import if not imported.domain)
        opset.version = max(opset.version, OPSET)
        save_proto(proto, target)


def _round_blocks(
    matrix_KN: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Return a matrix as integers and the scales of its blocks of rows, (ceil(K / 32), N)."""
    K, N = matrix_KN.shape
    blocks = np.pad(matrix_KN, ((0, -K % BLOCK), (0, 0))).reshape(-1, BLOCK, N)
    scales_BN = np.abs(blocks).max(axis=1) / np.float32(LARGEST)
    scales_BN[scales_BN == 0] = 1
    rounded = np.rint(blocks / scales_BN[:, None]).astype(np.int8)
    return rounded.reshape(-1, N)[:K], scales_BN
