"""The files that tell how a training run went: metrics, curve, samples; gradients if asked."""

from collections.abc import Mapping
from pathlib import Path

from tinyllm.artifact import write_json
from tinyllm.report import thin, write_metrics, write_table
from tinyllm.training.run import TrainResult


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
    gradients = reports / stage / "gradients.tsv"
    if result.gradients:
        write_table(gradients, thin(result.gradients))
    else:
        gradients.unlink(missing_ok=True)  # of a run that was asked for them
    write_metrics(reports, stage, {**result.metrics, **figures})
