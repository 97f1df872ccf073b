"""A whole pipeline's reports and manifests with made-up numbers, for the report's tests."""

import math
import random
from pathlib import Path

from tinyllm import paths
from tinyllm.artifact import build_artifact, write_json
from tinyllm.report import write_metrics, write_table

PARITY = {
    "positions": 1000,
    "max_logit_diff": 5.8e-06,
    "max_cached_logit_diff": 5.7e-06,
    "top1_agreement": 1.0,
    "greedy_tokens": 800,
    "greedy_equal_tokens": 800,
    "divergence_margin": 0.0,
}
TRAINED = {"train_loss": 2.31, "tokens": 4096000, "tokens_per_s": 9876.5, "mfu": 0.123}
TRAINED |= {"peak_memory_bytes": 1234567890, "seconds": 412.3, "steps_done": 2000, "compiled": 1}


def curve(n_steps, every, seed):
    rng = random.Random(seed)
    rows = []
    for step in range(0, n_steps + 1, every):
        loss = 2.2 + 5.4 * math.exp(-7 * step / n_steps) - 0.5 * step / n_steps
        row = {
            "step": step,
            "train_loss": loss + rng.gauss(0, 0.05),
            "lr_share": lr(step / n_steps),
        }
        if step % (n_steps // 10) == 0:
            row |= {"val_loss": loss + 0.08, "val_bpb": loss / 2}
        rows.append(row)
    return rows


def lr(share):
    return min(1.0, share / 0.02) if share < 0.4 else (1 - share) / 0.6


def speed(factor):
    return {
        "val_bpb": 1.98765,
        "decode_tokens_per_s": 212.3 * factor,
        "decode_spread_share": 0.031,
        "decode_no_cache_tokens_per_s": 41.2 * factor,
        "prefill_tokens_per_s": 2345.6 * factor,
        "first_token_ms": 43.2 / factor,
        "model_memory_bytes": 54321000,
        "peak_memory_bytes": 654321000,
        "file_bytes": 20728071,
    }


def write_reports(reports: Path, stages=None):
    """Write the reports of some stages, or of all."""
    verse = "KING HENRY.\nWhat, is the old king dead? <script>alert('x')</script> & so on,\n" * 6
    answers = "> What is AI?\n{0}\n\n> Do you like <b>cheese</b>?\n{1}"
    chat = [
        {"step": 0, "text": answers.format("The king,\nmy lord, the king …", "&amp; lo …")},
        {"step": 150, "text": answers.format("A branch of science. ■", "I do not eat. ■")},
    ]
    told = {
        "download": {"shakespeare": {"bytes": 5057198, "documents": 42, "files": 42}},
        "clean": {
            "documents": 42, "documents_dropped": 5, "documents_train": 34, "documents_val": 3,
            "bytes_train": 4739138, "bytes_val": 313901,
            "reasons": {"near_duplicate": 3, "too_short": 2},
        },
        "train_tokenizer": {"vocab_size": 4096, "bytes_per_token": 3.26},
        "prune_vocab": {
            "vocab_size": 2048, "vocab_size_before": 4096, "bytes_per_token": 2.9217,
            "bytes_per_token_before": 3.26, "unreachable_tokens": 0,
        },
        "encode": {
            "tokens_per_s": 764141,
            "train": {"documents": 38, "tokens": 1551609, "bytes_per_token": 2.97},
            "val": {"documents": 3, "tokens": 107438, "bytes_per_token": 2.92},
        },
        "pretrain": {**TRAINED, "val_bpb": 1.98765, "val_loss": 4.02, "parameters": 5182720},
        "chat_data": {
            "dropped": {"duplicate": 1127, "malformed": 1},
            "sft": {"train": {"conversations": 792, "turns": 1666, "tokens": 34451}},
            "lora": {"val": {"conversations": 10, "turns": 20, "tokens": 313}},
        },
        "sft": {**TRAINED, "val_bpb": 2.1, "val_bpb_before": 3.4, "ended_share": 1.0},
        "lora": {**TRAINED, "val_bpb": 1.8, "val_bpb_before": 2.6, "trainable_share": 0.0123},
        "quantize": {
            "val_bpb": 1.9891, "val_bpb_before": 1.9877, "val_bpb_increase_share": 0.0007,
            "fp32_bytes": 20728071, "bf16_bytes": 10364035, "int8_bytes": 5876543,
            "layers": {name: {"sqnr_db": 31.5 + 2 * i} for i, name in enumerate(
                ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
            )},
        },
        "export": {
            "transformers": PARITY, "onnx": PARITY,
            "onnx_int8": {**PARITY, "greedy_equal_tokens": 103, "max_logit_diff": 0.159},
            "onnx_genai": {"missing": "not installed: onnxruntime_genai"},
            "text": {"texts": 3, "unequal_texts": 0, "chats": 7, "unequal_chats": 0},
        },
        "benchmark": {
            name: speed(factor) for name, factor in {
                "pretrain": 1.01, "sft": 0.99, "lora": 1.0, "lora_bf16": 1.4, "int8": 2.1,
                "onnx": 1.8, "onnx_int8": 3.1,
            }.items()
        },
    }  # fmt: skip
    for stage, metrics in told.items():
        if stages is None or stage in stages:
            write_metrics(reports, stage, metrics)
            if stage in ("pretrain", "sft", "lora"):
                write_table(reports / stage / "curve.tsv", curve(2000, 10, len(stage)))
                texts = [{"step": 500 * i, "text": verse} for i in range(5)]
                write_json(reports / stage / "samples.json", texts if stage == "pretrain" else chat)
            if stage == "benchmark":
                write_json(reports / stage / "hardware.json", {
                    "processor": "Imaginary CPU 9000 @ 3.00GHz", "cores": 2, "usable_cpus": 2,
                    "threads": 2, "instructions": "AVX512", "memory_bytes": 8e9, "gpu": None,
                    "system": "Linux x86_64", "torch": "2.13.0+cpu", "onnxruntime": "1.31.1",
                })  # fmt: skip


def write_manifests(root: Path):
    """Write artifacts without files, each made from the one before."""
    before = []
    for kind, path in {
        "raw": paths.RAW, "clean": paths.CLEAN, "tokenizer": paths.TOKENIZER,
        "tokens": paths.TOKENS, "pretrain": paths.PRETRAIN, "lora": paths.LORA_MERGED,
        "int8": paths.INT8, "export": paths.EXPORT,
    }.items():  # fmt: skip
        config = {"seed": 1337, "model": {"d": 256, "n_layers": 6, "d_ff": None}, "x": [1, 2]}
        with build_artifact(root / path, kind=kind, made_from=before, config=config):
            pass
        before = [root / path]
