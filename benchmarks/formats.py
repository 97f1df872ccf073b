"""What each number format costs: val_bpb of one trained model with its weights and cache in each.

    python benchmarks/formats.py [--models data/models] [--tokens-from data/tokens]

W8A16 has INT8 weights and bf16 activations, W8A8 both in INT8. W4A8 has 4-bit weights in the
blocks, rounded by the training text as the stage does. The rows with a cache let every window pass
through one. fp32 is the model before quantisation.
The last line is one JSON object. `--quick` ends within 50 s.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tinyllm.evaluation.loss import TokenPart, evaluate_stream
from tinyllm.inference.cache import KVCache
from tinyllm.model.directory import load_model
from tinyllm.model.transformer import Transformer
from tinyllm.ops.reference import hadamard
from tinyllm.quantization.calibration import read_windows
from tinyllm.quantization.int8 import quantize_model
from tinyllm.quantization.layers import QuantizedLinear, QuantizedMatrix
from tinyllm.shards.reader import TokenShards
from tinyllm.shards.stream import TokenStream

SEQ_LEN, BATCH_TOKENS = 256, 2048
CALIBRATION_TOKENS = 16384


class Cached:
    """A model whose windows pass through a cache."""

    def __init__(self, model: Transformer, dtype: torch.dtype) -> None:
        self._model, self._dtype, self.rope_cos = model, dtype, model.rope_cos

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Return the logits, (B, T, V)."""
        B, T = ids_BT.shape
        cache = KVCache(self._model.config, B, T, self._dtype, "cpu")
        return self._model.head(self._model.hidden(ids_BT, cache=cache))


def with_dequantized_weights(model: Transformer, sample_BT: Tensor) -> Transformer:
    """Return W8A16: a bf16 model that has the INT8 model's weights."""
    rounded = quantize_model(model, sample_BT=sample_BT)
    for parent in list(rounded.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, QuantizedMatrix):
                weight = layer.weight_q * layer.weight_scale[:, None]
                n, k = weight.shape
                plain: nn.Module
                if isinstance(layer, QuantizedLinear):
                    plain = nn.Linear(k, n, bias=False)
                    exact = hadamard(weight) if layer.is_rotated else weight  # its own inverse
                    plain.weight = nn.Parameter(exact)
                else:
                    plain = nn.Embedding(n, k, _weight=weight)
                parent.add_module(name, plain)
    found = Transformer(model.config)
    found.load_state_dict(rounded.state_dict())
    return found.bfloat16().eval()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", type=Path, default=Path("data/models"))
    parser.add_argument("--tokens-from", type=Path, default=Path("data/tokens"))
    parser.add_argument("--quick", action="store_true", help="16 windows")
    options = parser.parse_args()
    model = load_model(options.models / "lora" / "merged")
    val = TokenShards.open(options.tokens_from, "val", None)
    split: TokenShards | TokenPart = val
    if options.quick:
        n = 16 * SEQ_LEN
        share = n / val.n_tokens  # bytes of the part: the same number for every row
        part = TokenStream([val.stream.read(0, n).astype(np.uint32)])
        split = TokenPart(stream=part, n_bytes=round(val.n_bytes * share))
    train = TokenShards.open(options.tokens_from, "train", None)
    sample = read_windows(train.stream, CALIBRATION_TOKENS, SEQ_LEN)
    int8 = quantize_model(model, sample_BT=sample)
    formats: dict[str, Callable[[], Transformer | Cached]] = {
        "fp32": lambda: model,
        "W8A8": lambda: int8,
        "W8A8, fp32 cache": lambda: Cached(int8, torch.float32),
        "W8A8, bf16 cache": lambda: Cached(int8, torch.bfloat16),
        "W8A8, INT8 cache": lambda: Cached(int8, torch.int8),
        "W4A8, to the nearest": lambda: quantize_model(model, weight_bits=4),
        "W4A8": lambda: quantize_model(model, sample_BT=sample, weight_bits=4),
        "W8A16": lambda: with_dequantized_weights(model, sample),
        "bf16": lambda: model.bfloat16(),  # last: in place
    }
    rows = {}
    for name, make in formats.items():
        sizes = {"seq_len": SEQ_LEN, "batch_tokens": BATCH_TOKENS}
        rows[name] = evaluate_stream(make(), split, **sizes, precision="fp32").val_bpb
        print(f"{name:20}{rows[name]:10.5f}{rows[name] / rows['fp32'] - 1:+10.3%}", flush=True)
    print(json.dumps({name: round(value, 6) for name, value in rows.items()}))


if __name__ == "__main__":
    main()
