"""benchmark: every model, data/tokens -> reports/benchmark/{hardware,metrics}.json."""

from dataclasses import dataclass

import numpy as np

from stages.runner import console_progress, run_stage
from stages.subjects import all_subjects
from tinyllm import paths
from tinyllm.artifact import merge_lineage, write_json
from tinyllm.evaluation.hardware import fingerprint
from tinyllm.evaluation.loss import TokenPart
from tinyllm.evaluation.speed import BenchmarkParams, check_fits, measure_speed
from tinyllm.model.directory import load_config
from tinyllm.params import load_params
from tinyllm.report import write_metrics
from tinyllm.shards.reader import TokenShards
from tinyllm.shards.stream import TokenStream
from tinyllm.tokenizer.tokenizer import Tokenizer
from tinyllm.training.precision import choose_device, use_threads


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """The sections this stage reads."""

    benchmark: BenchmarkParams


def benchmark() -> None:
    """Measure speed, memory, size and bits per byte of every model on this machine."""
    params, progress = load_params(Params, paths.PARAMS).benchmark, console_progress()
    n_threads, device = use_threads(), str(choose_device())
    models = [paths.PRETRAIN, paths.SFT, paths.LORA_MERGED, paths.INT8, paths.EXPORT]
    merge_lineage([*models, paths.TOKENS])  # refuses models of different ancestry
    check_fits(params, load_config(paths.LORA_MERGED)[0].max_seq_len)
    tokenizer, val = Tokenizer.load(paths.LORA_MERGED), TokenShards.open(paths.TOKENS, "val", None)
    ids = val.stream.read(0, params.eval_tokens or val.n_tokens)
    metrics = measure_speed(
        all_subjects(device, n_threads),
        val.stream.read(0, params.prompt_tokens).tolist(),
        TokenPart(stream=TokenStream([ids.astype(np.uint32)]), n_bytes=tokenizer.n_bytes(ids)),
        params,
        n_threads=n_threads,
        progress=progress,
    )
    write_json(paths.REPORTS / "benchmark" / "hardware.json", fingerprint())
    write_metrics(paths.REPORTS, "benchmark", metrics)


if __name__ == "__main__":
    run_stage(benchmark)
