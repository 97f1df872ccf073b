"""The page as one HTML file that needs nothing else: no script, no font, no link to elsewhere."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stages.page.blocks import Figure, Page
from stages.page.chapters import CHAPTERS
from stages.page.facts import STAGES, Facts
from stages.page.numbers import scaled, show
from tinyllm import paths

TEMPLATE = "page.html.jinja"


def render_page(facts: Facts) -> str:
    """Return the HTML; the same facts give the same text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(page=build_page(facts))


def build_page(facts: Facts) -> Page:
    """Arrange the facts."""
    return Page(
        headline="A small language model, from raw text to chat",
        subtitle=_subtitle(facts),
        figures=[figure for figure in _headline(facts) if figure],
        stages=[(stage, stage in facts.metrics) for stage in STAGES],
        sections=[chapter(facts) for chapter in CHAPTERS],
    )


def _subtitle(facts: Facts) -> str:
    """Return the model and its corpus in a sentence; nothing of what is not known."""
    parts = []
    n = facts.metric("pretrain", "parameters")
    model = facts.manifests.get(paths.PRETRAIN)
    sizes = model.config.get("model", {}) if model else {}
    if n:
        parts.append(f"{scaled(n, '').strip()} parameters")
    if sizes:
        parts.append(f"{sizes.get('n_layers')} layers of width {sizes.get('d')}")
    if vocab := facts.metric("prune_vocab", "vocab_size"):
        parts.append(f"a vocabulary of {vocab:,}")
    if tokens := facts.metric("encode", "train", "tokens"):
        sources = ", ".join(facts.metrics.get("download", {}))
        parts.append(f"{scaled(tokens, '').strip()} tokens of {sources or 'text'}")
    return ", ".join(parts)


def _headline(facts: Facts) -> list[Figure | None]:
    """Return the few numbers that say how good, how small and how fast."""
    stored = facts.quantized
    bits = stored.upper()
    fp32 = show("", facts.metric("benchmark", "lora", "decode_tokens_per_s"))
    return [
        _figure(
            "bits per byte of held-out text",
            show("val_bpb", facts.metric("pretrain", "val_bpb")),
            "pretrained; lower is better",
        ),
        _change(facts, "sft", "val_bpb_before", "bits per byte of answers", "fine-tuning"),
        _change(facts, "lora", "val_bpb_before", "bits per byte of new answers", "LoRA"),
        _change(facts, "quantize", "val_bpb_before", f"bits per byte in {bits}", "quantisation"),
        _figure(
            f"size in {bits}",
            show("bytes", facts.metric("quantize", f"{stored}_bytes")),
            f"fp32: {show('fp32_bytes', facts.metric('quantize', 'fp32_bytes'))}",
        ),
        _figure(
            f"tokens per second in {bits}",
            show("", facts.metric("benchmark", stored, "decode_tokens_per_s")),
            f"fp32: {fp32}; {facts.hardware.get('processor', '')}",
        ),
    ]


def _figure(name: str, value: str, note: str) -> Figure | None:
    return Figure(name, value, note) if value[0].isdigit() else None


def _change(facts: Facts, stage: str, before: str, name: str, what: str) -> Figure | None:
    """Return a stage's val_bpb with the one before it."""
    was = show("val_bpb", facts.metric(stage, before))
    return _figure(name, show("val_bpb", facts.metric(stage, "val_bpb")), f"{was} before {what}")
