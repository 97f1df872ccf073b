"""Lines over training steps as SVG paths.

The box is 1000 by 1000 and is stretched to its place on the page, so that lines follow the width of
a phone while labels, which are HTML, keep their size. y points down, as in SVG.
"""

import math
from collections.abc import Sequence

from stages.page.blocks import Band, Chart, Series, Tick
from stages.page.facts import Row
from stages.page.numbers import plain

BOX = 1000
MAX_BANDS = 60
_NICE = (1, 2, 2.5, 5, 10)


def line_chart(
    title: str, rows: Sequence[Row], names: Sequence[str], *, is_low: bool = False
) -> Chart | None:
    """Return a chart of some columns over `step`; None if there is nothing to draw.

    Args:
        title: with the unit.
        rows: of a curve; absent values leave no point.
        names: the columns, one line each.
        is_low: half as high.
    """
    rows = [row for row in rows if "step" in row]
    drawn = [name for name in names if any(_has(row, name) for row in rows)]
    values = [row[name] for row in rows for name in drawn if _has(row, name)]
    if not values:
        return None
    last_step = max(row["step"] for row in rows)
    low, high = min(values), max(values)
    margin = 0.04 * ((high - low) or 1.0)
    low, high = low - margin, high + margin
    y_ticks = [y for y in nice_ticks(low, high, 3 if is_low else 5) if low <= y <= high]

    def place(row: Row, name: str) -> tuple[float, float]:
        """Return a point of the picture, counted from its upper left corner."""
        x = BOX * row["step"] / max(last_step, 1)
        return x, BOX * (high - row[name]) / (high - low)

    series = []
    for i, name in enumerate(drawn):
        present = [row for row in rows if _has(row, name)]
        points = [place(row, name) for row in present]
        series.append(
            Series(
                name,
                "ab"[i % 2],
                _path(points),
                plain(present[-1][name]),
                round(points[-1][1] / BOX * 100, 2),
                "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
                if len(points) < len(rows) / 2
                else "",
            )
        )
    return Chart(
        title,
        series,
        [Tick(round(100 * x / max(last_step, 1), 2), plain(int(x))) for x in _steps(last_step)],
        [Tick(round(100 * (high - y) / (high - low), 2), f"{y:g}") for y in y_ticks],
        _bands(rows, drawn, last_step),
        is_low,
    )


def nice_ticks(low: float, high: float, n: int) -> list[float]:
    """Return about n round values that enclose a range.

    >>> nice_ticks(2.1, 7.6, 5)
    [2.0, 4.0, 6.0, 8.0]
    """
    span = (high - low) or abs(high) or 1.0
    rough = span / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in _NICE if power * nice >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _has(row: Row, name: str) -> bool:
    return name in row and math.isfinite(row[name])


def _path(points: Sequence[tuple[float, float]]) -> str:
    """Return an SVG path through points; numbers with one digit are exact to a tenth of a pixel."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _steps(last_step: float) -> list[float]:
    """Return the round steps to label, and not more than the width of a phone takes."""
    return [x for x in nice_ticks(0, max(last_step, 1), 4) if x <= last_step]


def _bands(rows: Sequence[Row], names: Sequence[str], last_step: float) -> list[Band]:
    """Return strips that tell the values around them, as many as can be pointed at."""
    stride = -(-len(rows) // MAX_BANDS) or 1
    chosen = rows[::stride]
    width = 100 / max(len(chosen), 1)
    bands = []
    for row in chosen:
        told = [f"{name} {plain(row[name])}" for name in names if _has(row, name)]
        left = 100 * row["step"] / max(last_step, 1) - width / 2
        bands.append(
            Band(round(left, 2), round(width, 2), "\n".join([f"step {row['step']:.0f}", *told]))
        )
    return bands
