"""What the pipeline has left on disk, read for the report; anything may be missing."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllm import paths
from tinyllm.artifact import MANIFEST, Manifest, load_manifest
from tinyllm.errors import ArtifactError

STAGES = (
    "download",
    "clean",
    "train_tokenizer",
    "prune_vocab",
    "encode",
    "pretrain",
    "chat_data",
    "sft",
    "lora",
    "quantize",
    "export",
    "benchmark",
)
"""Whose reports are read, in the order in which they run."""
TRAINED = ("pretrain", "sft", "lora")
ARTIFACTS = (
    paths.RAW,
    paths.CLEAN,
    paths.TOKENIZER_FULL,
    paths.TOKENIZER,
    paths.TOKENS,
    paths.PRETRAIN,
    paths.CHAT,
    paths.SFT,
    paths.LORA_ADAPTER,
    paths.LORA_MERGED,
    paths.INT8,
    paths.EXPORT,
)
"""Whose manifests are read, ancestors first."""

Row = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Everything the page is made of."""

    metrics: Mapping[str, Mapping[str, Any]]
    """By stage; a stage that has not run is absent."""
    curves: Mapping[str, list[Row]]
    """By trained stage; cells without a value are absent from their row."""
    samples: Mapping[str, list[dict[str, Any]]]
    """By trained stage: `step` and `text`."""
    hardware: Mapping[str, Any]
    """What speeds were measured on; empty if they were not."""
    manifests: Mapping[Path, Manifest]
    """By folder."""
    versions: Mapping[str, str]
    """Of the libraries that made the last artifact."""

    @property
    def quantized(self) -> str:
        """What the quantised weights are, int8 or int4: rows and metrics are named after it."""
        return "int4" if self.metric("quantize", "int4_bytes") else "int8"

    def metric(self, stage: str, *names: str) -> Any:
        """Return a metric by its path, None if the stage or the name is not there."""
        value: Any = self.metrics.get(stage)
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value


def read_facts(reports: Path, root: Path) -> Facts:
    """Read what is there.

    Args:
        reports: the folder of all reports.
        root: the folder that the artifacts' paths are relative to.

    Raises:
        ArtifactError: a file is there but cannot be read.
    """
    manifests = {
        path: load_manifest(root / path) for path in ARTIFACTS if (root / path / MANIFEST).is_file()
    }
    versions = _read_json(root / list(manifests)[-1] / MANIFEST)["versions"] if manifests else {}
    return Facts(
        metrics=_by_stage(STAGES, reports, "metrics.json", _read_metrics),
        curves=_by_stage(TRAINED, reports, "curve.tsv", _read_curve),
        samples=_by_stage(TRAINED, reports, "samples.json", _read_json),
        hardware=_by_stage(("benchmark",), reports, "hardware.json", _read_json).get(
            "benchmark", {}
        ),
        manifests=manifests,
        versions=versions,
    )


def _by_stage(stages: tuple[str, ...], reports: Path, name: str, read: Any) -> dict[str, Any]:
    """Return what `read` makes of a file of each stage, where it exists."""
    files = {stage: reports / stage / name for stage in stages}
    return {stage: read(file) for stage, file in files.items() if file.is_file()}


def _read_metrics(path: Path) -> Any:
    """Return the metrics inside their stage's name."""
    return _read_json(path).get(path.parent.name, {})


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, error) from None


def _read_curve(path: Path) -> list[Row]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [
                {name: float(cell) for name, cell in row.items() if cell}
                for row in csv.DictReader(file, delimiter="\t")
            ]
    except (ValueError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{path}: damaged: {error}; run `dvc repro --force {path.parent.name}`")
