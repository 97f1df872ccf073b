"""The parity table of any model directory, on the terminal: `tinyllm verify`, and the stage."""

import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tinyllm import paths
from tinyllm.artifact import Manifest, load_manifest, merge_lineage, verify_files
from tinyllm.corpus.documents import read_documents
from tinyllm.errors import DataError, LineageError
from tinyllm.export.bundle import write_bundle
from tinyllm.export.params import ExportParams
from tinyllm.export.proof import Proof, prove_bundle
from tinyllm.params import load_params
from tinyllm.progress import Progress

MAX_DOCUMENTS = 1000
"""Validation documents that tokenizers are compared on."""
_COLUMNS = ("runtime", "max |Δ|", "cached", "KL", "top-1", "parts", "texts", "MB", "tok/s")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Params:
    """The section that says how much to compare."""

    export: ExportParams


def export_params() -> ExportParams:
    """Return the `export` section of params.yaml."""
    return load_params(_Params, paths.PARAMS).export


def held_out_texts() -> list[str]:
    """Return the first validation documents of data/clean.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    verify_files(paths.CLEAN, load_manifest(paths.CLEAN, "clean"))
    documents = islice(read_documents(paths.CLEAN / "val"), MAX_DOCUMENTS)
    return [document.text for document in documents]


def verify_model(
    model_dir: Path, export_dir: Path | None, text: Path | None, progress: Progress
) -> Proof:
    """Compare an export of a model with the model.

    Args:
        model_dir: a float model directory.
        export_dir: its export; None: it is written for this call and thrown away.
        text: a file of held-out text; None: the validation documents of data/clean.
        progress: told what is done.

    Raises:
        LineageError: the export is of another model, or the documents are not those held out.
        ArtifactError: a folder is missing or damaged.
        DataError: there is no text.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it looks up nothing
    params, quantized = export_params(), _quantized_of(model_dir)
    texts = _held_out(model_dir, text)
    if export_dir is not None:
        skipped = _require_export_of(model_dir, export_dir).info.get("skipped")
        return prove_bundle(model_dir, export_dir, texts, params, progress, skipped, quantized)
    with TemporaryDirectory() as folder:
        write_bundle(model_dir, Path(folder), params, progress)
        return prove_bundle(model_dir, Path(folder), texts, params, progress, quantized=quantized)


def parity_table(proof: Proof, max_logit_diff: float) -> Table:
    """Return the table, 80 characters wide; what was not compared has no numbers in it.

    Args:
        proof: the numbers.
        max_logit_diff: the bar of the runtimes that must be equal.
    """
    table = Table(
        *_COLUMNS,
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        caption=f"* another precision; all others must stay within {max_logit_diff:g}",
        caption_justify="left",
    )
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in proof.rows.items():
        parity = row.parity
        parts = parity.greedy_equal_tokens < parity.greedy_tokens
        table.add_row(
            name if row.exact else f"{name} *",
            f"{parity.max_logit_diff:.1e}",
            f"{parity.max_cached_logit_diff:.1e}",
            f"{parity.kl:.1e}",
            f"{parity.top1_agreement:.1%}",
            f"{parity.first_divergence}" if parts else "never",
            "" if row.unequal_texts is None else str(row.unequal_texts),
            f"{row.file_bytes / 1e6:.1f}",
            f"{parity.tokens_per_s:.0f}",
        )
    for name in proof.missing:
        table.add_row(name, *["–"] * (len(_COLUMNS) - 1))
    return table


def missing_lines(proof: Proof) -> list[str]:
    """Return one line per runtime that was not compared, with the reason in full."""
    return [f"{name}: {reason}" for name, reason in proof.missing.items()]


def _held_out(model_dir: Path, text: Path | None) -> list[str]:
    """Return texts that the model has not learned from."""
    if text is not None:
        try:
            content = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{text}: not readable as UTF-8 text: {error}") from None
        if not content.strip():
            raise DataError(f"{text}: is empty; give some held-out text")
        return [content]
    merge_lineage([model_dir, paths.CLEAN])
    return held_out_texts()


def _quantized_of(model_dir: Path) -> Path | None:
    """Return the pipeline's quantised model if it was made from this one."""
    if not paths.INT8.exists():
        return None
    model = load_manifest(model_dir)
    made_from = load_manifest(paths.INT8, "int8").lineage.get(model.kind)
    return paths.INT8 if made_from == model.digest else None


def _require_export_of(model_dir: Path, export_dir: Path) -> Manifest:
    """Return the manifest of an export; refuse that of another model, and a damaged one."""
    model, manifest = load_manifest(model_dir), load_manifest(export_dir, "export")
    exported = manifest.lineage.get(model.kind, "none")
    if exported != model.digest:
        raise LineageError(
            f"{export_dir}: made from {model.kind} {exported[:12]}, {model_dir} is"
            f" {model.digest[:12]}; export it again or name its own model directory"
        )
    verify_files(export_dir, manifest)
    return manifest
