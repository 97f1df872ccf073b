"""The files that tell how a training run went: metrics.json, curve.tsv, samples.json."""

from collections.abc import Mapping
from pathlib import Path

from tinyllm.artifact import write_json
from tinyllm.report import thin, write_metrics, write_table
from tinyllm.training.loop import TrainResult


def write_outcome(
    reports: Path, stage: str, result: TrainResult, figures: Mapping[str, float]
) -> None:
    """Write `<reports>/<stage>/`.

    Args:
        reports: the folder of all reports.
        stage: the stage's name.
        result: what the run told.
        figures: further metrics, such as those of the whole validation split.
    """
    write_table(reports / stage / "curve.tsv", thin(result.curve))
    write_json(reports / stage / "samples.json", result.samples)
    write_metrics(reports, stage, {**result.metrics, **figures})
