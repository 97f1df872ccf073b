"""Static ONNX graphs against the dynamic one: decoding and prefill speed, and parity with ours.

    python benchmarks/onnx_static.py [MODEL_DIR] [--text FILE] [--threads 1] [--context 256]

Static graphs whose caller writes the cache (host) and that write it themselves (graph), the dynamic
graph in fp32, fp16, INT8 (MatMulNBits) and INT8 (QDQ), and the host pair with every result rounded
to fp16. Without a model directory a random model of params.yaml's sizes is taken, without a text
random tokens. All caches hold `--context` positions; candidates take turns, token by token, so that
a busy moment hits all of them. Parity is over 4 passages of 64 tokens, each continued by 200 tokens
of our own model; equal tokens are counted up to the first other one. The last line is one JSON
object. `--quick` ends within 50 s.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a spinning thread stalls a busy machine

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tinyllm.export.onnx import export_onnx
from tinyllm.export.onnx_fp16 import to_fp16
from tinyllm.export.onnx_int8 import quantize_onnx
from tinyllm.export.onnx_qdq import quantize_qdq
from tinyllm.export.onnx_static import export_static
from tinyllm.export.runtime import OnnxModel
from tinyllm.export.static_runtime import StaticModel, open_rounded
from tinyllm.export.verify import Reference, build_references, compare, cut_prompts
from tinyllm.model.directory import load_model
from tinyllm.model.init import build_model
from tinyllm.model.sizes import ModelParams, resolve
from tinyllm.model.transformer import Transformer
from tinyllm.params import build_params, read_yaml
from tinyllm.tokenizer.tokenizer import Tokenizer

PARAMS = Path(__file__).parent.parent / "params.yaml"
OPSET, CHUNK, VOCAB_SIZE, PASSAGE = 20, 32, 4096, 64
Runner = OnnxModel | StaticModel


def random_model(*, quick: bool) -> Transformer:
    """Return a model of the shipped sizes, or of two blocks."""
    document = read_yaml(PARAMS)["model"] | ({"n_layers": 2} if quick else {})
    config = resolve(build_params(ModelParams, document, str(PARAMS)), VOCAB_SIZE)
    return build_model(config, seed=0).eval()


def open_all(model: Transformer, folder: Path, n_threads: int) -> dict[str, Runner]:
    """Export a model in every form; return what runs each."""
    forms = {"fp16": to_fp16, "int8": quantize_onnx, "int8 qdq": quantize_qdq}
    export_onnx(model, folder / "dynamic.onnx", OPSET)
    runners: dict[str, Runner] = {
        "dynamic": OnnxModel(folder / "dynamic.onnx", n_threads=n_threads)
    }
    for name in ("host", "graph"):
        (folder / name).mkdir()
        export_static(model, folder / name, opset=OPSET, chunk=CHUNK, writes=name)
        runners[f"static, {name}"] = StaticModel(folder / name, n_threads=n_threads)
    for name, convert in forms.items():
        convert(folder / "dynamic.onnx", folder / f"{name}.onnx")
        runners[f"dynamic, {name}"] = OnnxModel(folder / f"{name}.onnx", n_threads=n_threads)
    return runners | {
        "static, host, all in fp16": open_rounded(folder / "host", n_threads=n_threads)
    }


def passes(runner: Runner, context: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return what reads `context` tokens, and what reads one more; neither leaves a state."""
    ids = np.random.default_rng(0).integers(0, 256, context).tolist()
    if isinstance(runner, OnnxModel):
        row, empty = np.array([ids]), runner.empty_past(1)
        past = runner.forward(row, empty)[1]
        return lambda: runner.forward(row, empty), lambda: runner.forward(row[:, :1], past)
    cache = runner.forward(ids, 0, runner.empty_cache())[1]
    return lambda: runner.logits(ids), lambda: runner.forward(ids[:1], context, cache)


def speeds(runners: dict[str, Runner], context: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return tokens per second of prefill and decoding by name, from medians."""
    prepared = {name: passes(runner, context) for name, runner in runners.items()}
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runners}
    for i in range(rounds + 3):
        for name, both in prepared.items():
            for run, kept in zip(both, samples[name], strict=True):
                if run is both[0] and i % 8:
                    continue  # a prefill costs as much as many tokens
                started_s = time.perf_counter()
                run()
                if i >= 3 or run is both[0]:  # the first tokens warm up
                    kept.append(time.perf_counter() - started_s)
    return {
        name: {
            "prefill_tokens_per_s": context / statistics.median(prefill_s),
            "decode_tokens_per_s": 1 / statistics.median(decode_s),
        }
        for name, (prefill_s, decode_s) in samples.items()
    }


def parity(references: list[Reference], runner: Runner) -> dict[str, float]:
    """Return how far a runtime is from ours."""
    row, nats = compare(references, runner), []
    for reference in references:
        theirs = runner.logits([*reference.prompt_ids, *reference.answer[:-1]])
        p, q = (
            torch.from_numpy(logits).double().log_softmax(-1)
            for logits in (reference.logits, theirs)
        )
        nats.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return {
        "max_logit_diff": max(row.max_logit_diff, row.max_cached_logit_diff),
        "kl": statistics.mean(nats),
        "top1_agreement": row.top1_agreement,
        "greedy_tokens": row.greedy_tokens,
        "greedy_equal_tokens": row.greedy_equal_tokens,
    }


def prompts_of(options: argparse.Namespace, vocab_size: int) -> list[list[int]]:
    """Return passages of the text, or random tokens."""
    if options.text is None:
        return [list(row) for row in np.random.default_rng(1).integers(0, vocab_size, (4, PASSAGE))]
    ids = Tokenizer.load(options.model).encode(options.text.read_text(encoding="utf-8"))
    return cut_prompts([ids], 4, PASSAGE)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="a float model directory")
    parser.add_argument("--text", type=Path, help="held-out text; needs a model directory")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=100, help="tokens measured per candidate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="2 blocks, 16 rounds, one passage")
    options = parser.parse_args()
    if options.text is not None and options.model is None:
        parser.error("--text needs the model directory whose tokenizer reads it")
    torch.set_num_threads(options.threads)
    model = load_model(options.model) if options.model else random_model(quick=options.quick)
    new, longest = 40 if options.quick else 200, model.config.max_seq_len
    if longest < PASSAGE + new or longest <= options.context:
        parser.error(
            f"model.max_seq_len: {longest} positions; passages need {PASSAGE + new},"
            f" --context {options.context} one more than itself"
        )
    prompts = prompts_of(options, model.config.vocab_size)[: 1 if options.quick else None]
    references = build_references(model, prompts, new)
    with tempfile.TemporaryDirectory() as folder:
        runners = open_all(model, Path(folder), options.threads)
        fast = speeds(runners, options.context, 16 if options.quick else options.rounds)
        rows = {name: fast[name] | parity(references, runner) for name, runner in runners.items()}
    config = model.config
    print(
        f"d = {config.d}, {config.n_layers} blocks, cache of {config.max_seq_len},"
        f" {options.context} of it filled, chunks of {CHUNK}, {options.threads} threads\n"
    )
    print("| ONNX | prefill tokens/s | decode tokens/s | max. |Δlogit| | KL | top-1 | greedy |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['prefill_tokens_per_s']:.0f} | {row['decode_tokens_per_s']:.0f}"
            f" | {row['max_logit_diff']:.1e} | {row['kl']:.1e} | {row['top1_agreement']:.4f}"
            f" | {row['greedy_equal_tokens']}/{row['greedy_tokens']} |"
        )
    decode = {name: row["decode_tokens_per_s"] for name, row in rows.items()}
    summary = {
        "static_host_over_dynamic_decode": decode["static, host"] / decode["dynamic"],
        "static_graph_over_dynamic_decode": decode["static, graph"] / decode["dynamic"],
        "static_host_over_graph_decode": decode["static, host"] / decode["static, graph"],
        "runtimes": rows,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
