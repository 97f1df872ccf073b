"""A model as one ONNX file whose key-value cache goes in and comes out.

Inputs: `input_ids` (B, T), `attention_mask` (B, P + T) with 0 for padding on the left,
`position_ids` (B, T), and per layer `past_key_values.N.key` and `.value` (B, G, P, K); P may be 0.
Outputs: `logits` (B, T, V) and per layer `present.N.key` and `.value` (B, G, P + T, K). These are
Optimum's names. The model itself is exported unchanged: only its cache is another one.

With latent attention a key is the rotated shared key and a value the latent, of one head (G = 1).

A cache in a registered buffer would be dropped by the exporter without a warning; hence arguments.
Dimensions: B batch, T new positions, P earlier positions, G key-value heads, K head width.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyllm.errors import ArtifactError, DataError
from tinyllm.model.sizes import ModelConfig
from tinyllm.model.transformer import Transformer

LayerPast = tuple[Tensor, Tensor]
LOGITS = "logits"
MAX_BYTES = 2_000_000_000
"""A protobuf message, and so a single file, must stay below 2 GiB."""


def past_names(n_layers: int) -> list[str]:
    """Return the names of the cache inputs in order: layer by layer, key before value."""
    return [f"past_key_values.{i}.{part}" for i in range(n_layers) for part in ("key", "value")]


def present_names(n_layers: int) -> list[str]:
    """Return the names of the cache outputs, in the order of `past_names`."""
    return [f"present.{i}.{part}" for i in range(n_layers) for part in ("key", "value")]


def export_onnx(model: Transformer, path: Path, opset: int) -> None:
    """Write the ONNX file of a float model; the same model gives the same bytes.

    Args:
        model: in fp32 on the CPU, in evaluation mode.
        path: of the file; its folder exists.
        opset: version of the operator set.

    Raises:
        DataError: the weights do not fit into one file.
    """
    n_layers = model.config.n_layers
    write_graph(
        _WithCache(model),
        _example(model.config),
        path,
        opset,
        input_names=["input_ids", "attention_mask", "position_ids", *past_names(n_layers)],
        output_names=[LOGITS, *present_names(n_layers)],
        dynamic_shapes=_dynamic_shapes(n_layers),
    )


def write_graph(
    module: nn.Module, example: tuple[Any, ...], path: Path, opset: int, **names: Any
) -> Any:
    """Write one ONNX file of a module; return what it holds.

    Args:
        module: in fp32 on the CPU.
        example: its arguments.
        path: of the file; its folder exists.
        opset: version of the operator set.
        names: of inputs and outputs, and which dimensions are free, as torch's exporter takes them.

    Raises:
        DataError: the weights do not fit into one file.
    """
    n_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
    if n_bytes > MAX_BYTES:
        raise DataError(
            f"{path}: {n_bytes} bytes of weights do not fit into one ONNX file of {MAX_BYTES};"
            " export a smaller model"
        )
    with quiet():
        program = torch.onnx.export(
            module.eval(),
            example,
            dynamo=True,
            opset_version=opset,
            external_data=False,
            verbose=False,
            **names,
        )
        assert program is not None
        proto = program.model_proto
        save_proto(proto, path)
        return proto


def load_proto(path: Path) -> Any:
    """Return what an ONNX file holds.

    Raises:
        ArtifactError: it is missing, or damaged.
    """
    import onnx

    try:
        proto = onnx.load(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; build it with `dvc repro export`") from None
    except Exception as error:  # protobuf's class, whose module is not a dependency of ours
        raise ArtifactError(f"{path}: not a whole ONNX file: {error}") from None
    if not proto.graph.output:
        raise ArtifactError(f"{path}: not a whole ONNX file: it has no outputs")
    return proto


def save_proto(proto: Any, path: Path) -> None:
    """Write an ONNX model without what changes from machine to machine.

    The exporter notes the Python stack of every node, with absolute paths, and the shapes it
    inferred, which a runtime infers again.
    """
    graph = proto.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer, graph, proto):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    del graph.value_info[:]
    path.write_bytes(proto.SerializeToString(deterministic=True))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter and the quantiser: notes about their own inside, on every run.

    Importing ONNX Runtime's quantiser also configures the root logger; that is undone.
    """
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers, level = root.handlers[:], root.level
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


class _Layer:
    """A `LayerCache` that keeps nothing in place: new tensors instead."""

    def __init__(self, past: LayerPast) -> None:
        self.k, self.v = past

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Return earlier and new keys and values, both (B, G, P + T, K)."""
        self.k, self.v = torch.cat((self.k, k_BGTK), dim=2), torch.cat((self.v, v_BGTK), dim=2)
        return self.k, self.v


class _Cache:
    """A `Cache` over given positions and a given mask."""

    def __init__(self, past: Sequence[LayerPast], positions_BT: Tensor, mask: Tensor) -> None:
        self.layers = [_Layer(layer) for layer in past]
        self._plan = positions_BT, mask

    def plan(self, n_tokens: int) -> tuple[Tensor, Tensor | None]:
        """Return what was given; the number of tokens is in its shape."""
        return self._plan


class _WithCache(nn.Module):
    """The model with its cache as argument and result."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Sequence[LayerPast],
    ) -> tuple[Tensor, list[LayerPast]]:
        """Return the logits (B, T, V), and the keys and values (B, G, P + T, K) of each layer.

        Args:
            input_ids: (B, T), int64.
            attention_mask: (B, P + T), int64; 0 hides a position.
            position_ids: (B, T), int64.
            past: keys and values (B, G, P, K) of each layer.
        """
        n_past, T = past[0][0].shape[2], input_ids.shape[1]
        causal_TS = torch.arange(attention_mask.shape[1]) <= (n_past + torch.arange(T))[:, None]
        mask_B1TS = causal_TS & (attention_mask > 0)[:, None, None, :]
        cache = _Cache(past, position_ids, mask_B1TS)
        logits = self.model(input_ids, cache=cache)
        return logits, [(layer.k, layer.v) for layer in cache.layers]


def _example(config: ModelConfig) -> tuple[Any, ...]:
    """Return inputs of sizes above 1 that all differ: the exporter bakes equal ones together."""
    B, T, P = 2, 3, 4
    n_heads, d_k, d_v = config.cached
    past = [
        (torch.zeros(B, n_heads, P, d_k), torch.zeros(B, n_heads, P, d_v))
        for _ in range(config.n_layers)
    ]
    ids = torch.zeros(B, T, dtype=torch.long)
    mask = torch.ones(B, P + T, dtype=torch.long)
    return ids, mask, torch.arange(P, P + T).repeat(B, 1), past


def _dynamic_shapes(n_layers: int) -> tuple[Any, ...]:
    """Return which dimensions of `_example` are free, by name."""
    cache = {0: "batch", 2: "past"}
    tokens = {0: "batch", 1: "seq"}
    return tokens, {0: "batch", 1: "total"}, tokens, [(cache, cache)] * n_layers
