"""An ONNX file with 8-bit weights, made from the float one.

Weights are quantised symmetrically in blocks of 32 inputs, activations at run time: ONNX Runtime's
`MatMulNBits` at accuracy level 4. It is an operator of ONNX Runtime, not of the standard.
"""

from pathlib import Path
from typing import Any

from tinyllm.export.onnx import load_proto, quiet, save_proto

BLOCK = 32
INT8_ACTIVATIONS = 4
"""Accuracy level: 4 multiplies in integers; 0 would do so in fp32, twenty times slower."""


def quantize_onnx(source: Path, target: Path) -> None:
    """Write the 8-bit form of an ONNX file; the embedding table stays in fp32."""
    with quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            MatMulNBitsQuantizer,
        )

        proto = load_proto(source)
        untie_head(proto.graph)
        how = DefaultWeightOnlyQuantConfig(
            block_size=BLOCK, is_symmetric=True, accuracy_level=INT8_ACTIVATIONS, bits=8
        )
        quantizer = MatMulNBitsQuantizer(proto, algo_config=how)
        quantizer.process()
        save_proto(quantizer.model.model, target)


def untie_head(graph: Any) -> None:
    """Give a head that is tied to the embedding a matrix of its own.

    The float graph turns the shared table at run time (`Transpose`); only a matrix that is stored
    can be quantised.
    """
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in stored]:
        matrix = numpy_helper.to_array(stored[node.input[0]])
        turned = numpy_helper.from_array(matrix.T.copy(), node.output[0])
        graph.initializer.append(turned)
        graph.node.remove(node)
