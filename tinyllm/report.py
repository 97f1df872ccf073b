"""Metrics and curves that Git tracks: one folder per stage under reports/."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllm.artifact import write_json, write_text

CURVE_ROWS = 1000
"""Most rows of a curve: DVC embeds them in a page and Git keeps them."""


def write_metrics(reports: Path, stage: str, metrics: Mapping[str, Any]) -> None:
    """Write `<reports>/<stage>/metrics.json`, nested under the stage so that names never clash.

    Args:
        reports: the folder of all reports.
        stage: the stage's name.
        metrics: numbers by name, nested if wanted; a unit ends each name.
    """
    write_json(reports / stage / "metrics.json", {stage: metrics})


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as tab-separated values with a header; an absent value is an empty cell."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, delimiter="\t", lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def thin(rows: Sequence[Mapping[str, Any]], n_rows: int = CURVE_ROWS) -> list[Mapping[str, Any]]:
    """Return at most `n_rows` of the rows, evenly spread, the last one among them."""
    stride = -(-len(rows) // n_rows) or 1
    return [row for i, row in enumerate(rows) if (len(rows) - 1 - i) % stride == 0]
