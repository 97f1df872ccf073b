"""The same answers in every runtime: the parity table of three small trained architectures.

    python benchmarks/interop.py            # minutes; --quick: under a minute

Trained here, on this repository's own texts, are a base and a LoRA adapter for each of
gqa (LlamaForCausalLM), qk_norm (Qwen3ForCausalLM) and mla (DeepseekV3ForCausalLM). Then, for each:

* the export, and its parity table on held-out files (adapter, unmerged, in peft among its rows);
* the round trip: our folder -> transformers -> save_pretrained -> import -> logits;
* bits per byte in lm-evaluation-harness against ours, where it is installed;
* the pruning tool on the exported folder, its vocabulary cut to one held-out file.

The last line is one JSON object. The texts have odd white space on purpose: code, tables, lists.
"""

import argparse
import importlib.util
import json
import logging
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from lm_eval_bpb import compare as compare_bits_per_byte

from tinyllm.artifact import build_artifact
from tinyllm.export.bundle import Adapter, write_bundle
from tinyllm.export.formats import HF
from tinyllm.export.hf_import import import_hf
from tinyllm.export.params import ExportParams
from tinyllm.export.proof import Proof, prove_bundle
from tinyllm.export.prune_hf import prune_hf
from tinyllm.finetune.adapter import save_adapter
from tinyllm.finetune.lora import add_lora, merge_lora
from tinyllm.model.directory import CHAT_TEMPLATE, TOKENIZER, load_model, save_model
from tinyllm.model.init import build_model
from tinyllm.model.sizes import ModelParams, resolve
from tinyllm.model.transformer import Transformer
from tinyllm.params import build_params, read_yaml
from tinyllm.parity import missing_lines, parity_table
from tinyllm.progress import Silent
from tinyllm.quantization.directory import save_quantized_model
from tinyllm.quantization.int8 import quantize_model
from tinyllm.tokenizer import chat
from tinyllm.tokenizer.tokenizer import Tokenizer
from tinyllm.tokenizer.train import TokenizerParams, train_bpe

ROOT = Path(__file__).parent.parent
KINDS: dict[str, dict[str, Any]] = {
    "gqa": {"qk_norm": False},
    "qk_norm": {"qk_norm": True},
    "mla": {"attention": "mla", "qk_norm": False},
}
MLA = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
TARGETS = {"gqa": None, "qk_norm": None, "mla": MLA}
"""Layers of the adapter; peft takes no others of DeepSeek-V3 (`peft_refuses`)."""
SIZES = {"d": 128, "n_layers": 4, "n_heads": 4, "max_seq_len": 320}
STEPS, QUICK_STEPS = 600, 8
SAMPLE = 16384
"""Tokens of the training text by which INT8 rounding is compensated, as in params.yaml."""
SEQ_LEN, BATCH, LR, HELD_OUT_EVERY = 128, 8, 3e-3, 8
PASSAGES = 16
"""With 3 the share of equal likeliest tokens was up to 1 % off that of 16: ties, repeated."""


@dataclass(frozen=True)
class Lora:
    """The shape of a small adapter."""

    targets: tuple[str, ...] | None
    rank: int = 4
    alpha: float = 8.0
    dropout: float = 0.0


def texts() -> tuple[list[str], list[str]]:
    """Return the repository's own texts, for training and held out."""
    files = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("tinyllm/*/*.py"), *ROOT.glob("*.md")])
    contents = [path.read_text(encoding="utf-8") for path in files]
    held_out = contents[::HELD_OUT_EVERY]
    return [text for text in contents if text not in held_out], held_out


def train(model: Transformer, ids: torch.Tensor, n_steps: int, seed: int) -> float:
    """Train what is not frozen, in place; return the last loss."""
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=n_steps)
    generator, loss = torch.Generator().manual_seed(seed), torch.zeros(())
    for _ in range(n_steps):
        starts = torch.randint(0, len(ids) - SEQ_LEN - 1, (BATCH,), generator=generator)
        rows = torch.stack([ids[i : i + SEQ_LEN + 1] for i in starts.tolist()])
        logits = model(rows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return loss.item()


def write_models(kind: str, folder: Path, document: str, ids: torch.Tensor, n_steps: int) -> float:
    """Train a base and an adapter; write base, adapter and merged; return the base's loss."""
    sizes = SIZES if n_steps > QUICK_STEPS else {**SIZES, "n_layers": 1}
    params = {**read_yaml(ROOT / "params.yaml")["model"], **sizes, **KINDS[kind]}
    config = resolve(build_params(ModelParams, params, "model"), Tokenizer(document).vocab_size)
    model = build_model(config, seed=1)
    loss = train(model, ids, n_steps, seed=1)
    _write(model, folder / "base", document, [])
    add_lora(model, Lora(TARGETS[kind]), seed=2)
    train(model, ids, max(2, n_steps // 8), seed=2)
    with build_artifact(folder / "adapter", kind="adapter", made_from=[folder / "base"]) as draft:
        save_adapter(model, draft.path)
    merge_lora(model)
    _write(model, folder / "merged", document, [folder / "base", folder / "adapter"])
    return loss


def _write(model: Transformer, directory: Path, document: str, made_from: list[Path]) -> None:
    with build_artifact(directory, kind=directory.name, made_from=made_from) as draft:
        save_model(model, draft.path)
        (draft.path / TOKENIZER).write_text(document, encoding="utf-8")
        (draft.path / CHAT_TEMPLATE).write_text(chat.CHAT_TEMPLATE, encoding="utf-8")


def write_quantized(source: Path, work: Path, ids: torch.Tensor, activation_bits: int) -> Path:
    """Write a model in INT8, with activations of 8 or 16 bits; return the directory."""
    directory, sample_BT = work / f"a{activation_bits}", ids[:SAMPLE].view(-1, SEQ_LEN)
    with build_artifact(directory, kind="int8", made_from=[source]) as draft:
        model = load_model(source)
        rounded = quantize_model(model, sample_BT=sample_BT, activation_bits=activation_bits)
        save_quantized_model(rounded, draft.path)
    return directory


@torch.inference_mode()
def round_trip(merged: Path, hf_folder: Path, work: Path) -> float:
    """Return the largest |Δ logit| of our folder after a way through transformers."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(hf_folder, local_files_only=True).save_pretrained(
        work / "saved"
    )
    import_hf(work / "saved", work / "back")
    ids = torch.arange(6, 200)[None]
    return float((load_model(merged)(ids) - load_model(work / "back")(ids)).abs().max())


def measure(
    kind: str, work: Path, document: str, held_out: list[str], ids: torch.Tensor, quick: bool
) -> tuple[Proof, dict[str, Any]]:
    """Return the table and the further figures of one architecture."""
    loss = write_models(kind, work, document, ids, n_steps=QUICK_STEPS if quick else STEPS)
    settings = {**read_yaml(ROOT / "params.yaml")["export"], "prompts": PASSAGES}
    if quick:
        settings = {**settings, "prompts": 1, "prompt_tokens": 16, "greedy_tokens": 24}
    params = build_params(ExportParams, settings, "export")
    merged, export = work / "merged", work / "export"
    export.mkdir()
    adapter = Adapter(work / "base", work / "adapter")
    skipped = write_bundle(merged, export, params, Silent(), adapter)
    quantized = [write_quantized(merged, work, ids, bits) for bits in (8, 16)]
    proof = prove_bundle(merged, export, held_out, params, Silent(), skipped, quantized)
    figures: dict[str, Any] = {"train_loss": loss}
    figures["round_trip_max_logit_diff"] = round_trip(merged, export / HF, work)
    if importlib.util.find_spec("lm_eval") and not quick:
        figures["lm_eval"] = compare_bits_per_byte(merged, export / HF, held_out[0], 16)
    corpus = work / "corpus.txt"
    corpus.write_text(held_out[0], encoding="utf-8")
    pruned = prune_hf(export / HF, corpus, work / "pruned", None)
    figures["prune_hf"] = {name: getattr(pruned, name) for name in pruned.__dataclass_fields__}
    return proof, figures


def main() -> None:
    """Measure all and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="little training, short texts")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    learned, held_out = texts()
    settings = TokenizerParams(vocab_size=1024, min_count=2, sample_bytes=10**9)
    document = train_bpe(learned, settings)
    ids = torch.tensor([i for part in Tokenizer(document).encode_batch(learned) for i in part])
    results: dict[str, Any] = {"torch": torch.__version__, "held_out_files": len(held_out)}
    for kind in asked.kinds:
        with tempfile.TemporaryDirectory() as folder:
            proof, figures = measure(kind, Path(folder), document, held_out, ids, asked.quick)
        bar = read_yaml(ROOT / "params.yaml")["export"]["max_logit_diff"]
        print(f"\n{kind}: trained to {figures['train_loss']:.2f} nats per token")
        Console(width=110).print(parity_table(proof, bar))
        print(*missing_lines(proof), sep="\n")
        for name, value in figures.items():
            print(f"{name}: {value}")
        results[kind] = {**proof.to_metrics(speeds=True), **figures}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
