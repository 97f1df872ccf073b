"""quantize: data/models/lora/merged, data/tokens -> data/models/int8."""

from dataclasses import dataclass

from stages.runner import console_progress, run_stage
from tinyllm import paths
from tinyllm.artifact import build_artifact
from tinyllm.evaluation.loss import evaluate_stream
from tinyllm.model.directory import COPIED, WEIGHTS, load_model
from tinyllm.model.transformer import Transformer
from tinyllm.params import load_params
from tinyllm.quantization.calibration import read_windows
from tinyllm.quantization.directory import save_quantized_model
from tinyllm.quantization.gate import QuantizeParams, check_gate
from tinyllm.quantization.int8 import KINDS, quantize_model
from tinyllm.quantization.measure import measure_outputs, model_bytes
from tinyllm.report import write_metrics
from tinyllm.shards.reader import TokenShards

BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """The sections this stage reads."""

    quantize: QuantizeParams


def quantize() -> None:
    """Turn the model's matrices into INT8 or 4 bits and prove that it predicts as before."""
    params, progress = load_params(Params, paths.PARAMS).quantize, console_progress()
    model, source = load_model(paths.LORA_MERGED), paths.LORA_MERGED
    val, train = (TokenShards.open(paths.TOKENS, split, None) for split in ("val", "train"))
    seq_len, name = min(params.seq_len, model.config.max_seq_len), f"int{params.weight_bits}"
    windows = {"seq_len": seq_len, "batch_tokens": BATCH_TOKENS}
    sample = read_windows(train.stream, params.calibration_tokens, seq_len)

    def val_bpb(candidate: Transformer) -> float:
        """Return the bits per byte of all held-out text."""
        return evaluate_stream(candidate, val, **windows, precision="fp32").val_bpb

    inputs, copies = [source, paths.TOKENS], {name: source / name for name in COPIED}
    with build_artifact(
        paths.INT8, kind="int8", made_from=inputs, config=params, copies=copies
    ) as draft:
        quantized = quantize_model(model, KINDS, sample, params.weight_bits, params.activation_bits)
        before, after = val_bpb(model), val_bpb(quantized)
        progress.say(f"val_bpb {before:.4f} before, {after:.4f} in {name.upper()}")
        check_gate(model, before, after, params, val_bpb, sample)
        save_quantized_model(quantized, draft.path)
    bpb = {"val_bpb_before": before, "val_bpb": after, "val_bpb_increase_share": after / before - 1}
    sizes = {**model_bytes(model), f"{name}_bytes": (paths.INT8 / WEIGHTS).stat().st_size}
    first = read_windows(val.stream, seq_len, min(seq_len, val.n_tokens))
    layers = measure_outputs(model, quantized, first)
    write_metrics(paths.REPORTS, "quantize", {**bpb, **sizes, "layers": layers})


if __name__ == "__main__":
    run_stage(quantize)
