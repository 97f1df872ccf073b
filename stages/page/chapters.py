"""The chapters of the report, in the order of the pipeline."""

from collections.abc import Callable, Mapping
from typing import Any

from stages.page.blocks import Block, Section
from stages.page.charts import line_chart
from stages.page.facts import Facts
from stages.page.origin import lineage, settings
from stages.page.parts import comparison, counts, figures, is_number, talks, texts

_PARITY = {
    "max_logit_diff": "largest |Δ logit|",
    "max_cached_logit_diff": "with cache",
    "kl": "KL",
    "top1_agreement": "top-1",
    "greedy_equal_tokens": "equal tokens",
    "greedy_tokens": "of",
    "first_divergence": "parts at",
    "unequal_texts": "texts apart",
    "file_bytes": "size",
}
_SPEED = {
    "val_bpb": "bits per byte",
    "decode_tokens_per_s": "decoded tokens",
    "decode_no_cache_tokens_per_s": "without cache",
    "prefill_tokens_per_s": "prompt tokens",
    "first_token_ms": "first token",
    "file_bytes": "file",
    "model_memory_bytes": "memory",
    "decode_spread_share": "spread",
}
_WEIGHTS = {
    "int8": "Weights as 8-bit integers per output channel",
    "int4": "Weights of the blocks as 4-bit integers per output channel and 32 inputs, those of"
    " embedding and head as 8-bit ones per row",
}


def corpus(facts: Facts) -> Section:
    """Tell where the text comes from and what was kept."""
    sources = facts.metrics.get("download", {})
    rows = {name: row for name, row in sources.items() if isinstance(row, Mapping)}
    blocks: list[Block] = []
    if rows:
        columns = {"documents": "documents", "files": "files", "bytes": "size"}
        blocks.append(comparison(rows, columns))
    kept = ["documents_train", "documents_val", "bytes_train", "bytes_val", "documents_dropped"]
    blocks += [
        block
        for block in figures(_without(facts, "clean", "reasons"), "clean", kept)
        if "clean" in facts.metrics
    ]
    reasons = facts.metric("clean", "reasons")
    blocks += counts("Why documents were dropped", "reason", reasons or {})
    return Section(
        "clean",
        "Corpus",
        "Raw text is normalised, filtered and rid of duplicates; validation text is held out by"
        " name or by hash, and no near-duplicate of it stays in training.",
        blocks,
    )


def tokens(facts: Facts) -> Section:
    """Tell the vocabulary and how densely it holds the text."""
    blocks = figures(facts, "prune_vocab", ["vocab_size", "vocab_size_before", "bytes_per_token"])
    blocks = blocks or figures(facts, "train_tokenizer", ["vocab_size"])
    splits = facts.metrics.get("encode", {})
    rows = {name: row for name, row in splits.items() if isinstance(row, Mapping)}
    columns = {"documents": "documents", "tokens": "tokens", "bytes_per_token": "bytes per token"}
    if rows:
        blocks.append(comparison(rows, columns, bars=["tokens"]))
    return Section(
        "prune_vocab",
        "Tokens",
        "A byte-level BPE vocabulary, pruned to the merges that this text uses. Every text can be"
        " encoded and comes back unchanged.",
        blocks,
    )


def pretraining(facts: Facts) -> Section:
    """Tell the loss of the base model, and what it writes."""
    return Section(
        "pretrain",
        "Pretraining",
        "The model learns to predict the next token. Bits per byte of held-out text is the number"
        " that survives a change of vocabulary.",
        [*_training(facts, "pretrain"), *texts(facts, "pretrain")],
    )


def chat_data(facts: Facts) -> Section:
    """Tell what the chat model learns from."""
    rows = {
        f"{part} · {split}": values
        for part in ("sft", "lora")
        for split in ("train", "val")
        if (values := facts.metric("chat_data", part, split))
    }
    columns = {
        "conversations": "conversations",
        "turns": "turns",
        "tokens": "tokens",
        "supervised_tokens": "learned tokens",
    }
    blocks: list[Block] = [comparison(rows, columns, bars=["conversations"])] if rows else []
    blocks += counts(
        "Why conversations were dropped", "reason", facts.metric("chat_data", "dropped") or {}
    )
    return Section(
        "chat_data",
        "Conversations",
        "SFT and LoRA learn from different topics; validation conversations are held out.",
        blocks,
    )


def sft(facts: Facts) -> Section:
    """Tell about full fine-tuning, and the answers before and after it."""
    return Section(
        "sft",
        "Supervised fine-tuning",
        "All weights learn to answer and to end their turn; the loss counts answers only.",
        [*_training(facts, "sft"), *talks(facts, "sft")],
    )


def lora(facts: Facts) -> Section:
    """Tell about the adapter, and the answers before and after it."""
    return Section(
        "lora",
        "LoRA",
        "A low-rank adapter learns further topics and is then added to the weights.",
        [*_training(facts, "lora"), *talks(facts, "lora")],
    )


def quantization(facts: Facts) -> Section:
    """Tell what fewer bits cost and save."""
    layers = facts.metric("quantize", "layers") or {}
    order = ["val_bpb_before", "val_bpb", "val_bpb_increase_share", "fp32_bytes", "bf16_bytes"]
    order += [f"{facts.quantized}_bytes"]
    blocks = figures(_without(facts, "quantize", "layers"), "quantize", order)
    rows = {name: row for name, row in layers.items() if isinstance(row, Mapping)}
    if rows:
        columns = {"sqnr_db": "signal to noise"}
        blocks.append(comparison(rows, columns, bars=["sqnr_db"]))
    return Section(
        "quantize",
        facts.quantized.upper(),
        f"{_WEIGHTS[facts.quantized]}, activations per token. 6 dB of signal to noise are one bit.",
        blocks,
    )


def parity(facts: Facts) -> Section:
    """Compare other runtimes with ours."""
    told = facts.metrics.get("export", {})
    rows = {
        name: row
        for name, row in told.items()
        if isinstance(row, Mapping) and ("greedy_tokens" in row or "missing" in row)
    }
    missing = {name: row for name, row in rows.items() if "missing" in row}
    compared = {name: row for name, row in rows.items() if name not in missing}
    blocks: list[Block] = [comparison(compared, _PARITY)] if compared else []
    if missing:
        blocks.append(comparison(missing, {"missing": "not compared"}))
    rest = {name: value for name, value in told.items() if name not in rows}
    blocks += figures(_with(facts, "export", rest), "export", [])
    return Section(
        "export",
        "Export and parity",
        "The same held-out prompts in other runtimes, against our own model in fp32. Where greedy"
        " tokens are equal, the exported model is the same model.",
        blocks,
    )


def speed(facts: Facts) -> Section:
    """Compare every model on the machine at hand."""
    told = facts.metrics.get("benchmark", {})
    rows = {name: row for name, row in told.items() if isinstance(row, Mapping)}
    blocks: list[Block] = []
    if rows:
        blocks.append(comparison(rows, _SPEED, bars=["decode_tokens_per_s"]))
    where = _machine(facts)
    return Section(
        "benchmark",
        "Speed",
        f"Measured on {where}. Medians of interleaved rounds; the spread is the middle half of the"
        " rounds."
        if where
        else "Medians of interleaved rounds on the machine at hand.",
        blocks,
    )


CHAPTERS: tuple[Callable[[Facts], Section], ...] = (
    corpus,
    tokens,
    pretraining,
    chat_data,
    sft,
    lora,
    quantization,
    parity,
    speed,
    lineage,
    settings,
)
"""In the order of the page."""


def _training(facts: Facts, stage: str) -> list[Block]:
    """Return the curves and numbers of a training stage."""
    rows = facts.curves.get(stage, [])
    share = "lr_share" if any("lr_share" in row for row in rows) else "lr"
    charts = [
        line_chart("loss in nats per token", rows, ["train_loss", "val_loss"]),
        line_chart("learning rate, share of the peak", rows, [share], is_low=True),
    ]
    order = ["val_bpb", "val_bpb_before", "val_perplexity", "val_loss", "train_loss", "parameters"]
    order += ["trainable_share", "steps_done", "tokens", "seconds", "tokens_per_s"]
    order += ["peak_memory_bytes"]
    return [*(chart for chart in charts if chart), *figures(facts, stage, order)]


def _machine(facts: Facts) -> str:
    """Return the hardware in a phrase."""
    told = facts.hardware
    parts = [told.get("processor"), told.get("gpu")]
    if is_number(told.get("threads")):
        parts.append(f"{told['threads']} threads")
    parts += [told.get("instructions"), told.get("system")]
    parts += [f"{name} {told[name]}" for name in ("torch", "onnxruntime") if told.get(name)]
    return ", ".join(str(part) for part in parts if part)


def _with(facts: Facts, stage: str, values: Mapping[str, Any]) -> Facts:
    """Return the facts with other metrics of one stage."""
    return Facts(
        metrics={**facts.metrics, stage: values},
        curves=facts.curves,
        samples=facts.samples,
        hardware=facts.hardware,
        manifests=facts.manifests,
        versions=facts.versions,
    )


def _without(facts: Facts, stage: str, name: str) -> Facts:
    """Return the facts without one metric of one stage."""
    told = facts.metrics.get(stage, {})
    return _with(facts, stage, {key: value for key, value in told.items() if key != name})
