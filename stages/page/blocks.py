"""The parts that a page is made of; the template knows how each looks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its name."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """Numbers side by side."""

    kind: ClassVar = "figures"
    items: Sequence[Figure]


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table."""

    text: str
    title: str = ""
    """Shown in full where the text is short."""
    share: float | None = None
    """0 to 1: draws a bar behind the number."""
    mark: str = ""
    """`good` or `bad`."""
    is_number: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings; the first cell of a row names it."""

    kind: ClassVar = "table"
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """A line of a chart, in a box of 1000 by 1000 with y downwards."""

    name: str
    style: str
    """`a`, `b`: a colour of the page."""
    path: str
    last: str
    """The last value as text."""
    last_top: float
    """Where it lies, in percent from above."""
    dots: str
    """A path of points, where the values are so few that each is worth one."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    """Percent from the left or from above."""
    label: str


@dataclass(frozen=True, slots=True)
class Band:
    """A strip of a chart that tells its values when pointed at."""

    left: float
    width: float
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over steps."""

    kind: ClassVar = "chart"
    title: str
    series: Sequence[Series]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    bands: Sequence[Band]
    is_low: bool = False
    """Half as high."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A text with the step it was written at."""

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Samples:
    """Texts side by side."""

    kind: ClassVar = "samples"
    items: Sequence[Sample]


@dataclass(frozen=True, slots=True)
class Talk:
    """A question, and what was answered before and after training."""

    question: str
    before: str
    after: str
    before_ended: bool
    after_ended: bool


@dataclass(frozen=True, slots=True)
class Talks:
    """Answers before and after."""

    kind: ClassVar = "talks"
    items: Sequence[Talk]


@dataclass(frozen=True, slots=True)
class Folded:
    """A table that opens on demand."""

    kind: ClassVar = "folded"
    title: str
    table: Table


Block = Figures | Table | Chart | Samples | Talks | Folded


@dataclass(frozen=True, slots=True)
class Section:
    """A chapter of the page."""

    name: str
    """Its anchor: mostly the stage's name."""
    title: str
    lead: str
    blocks: Sequence[Block] = field(default_factory=tuple)
    """None: it has not run yet."""


@dataclass(frozen=True, slots=True)
class Page:
    """The whole report."""

    headline: str
    subtitle: str
    figures: Sequence[Figure]
    stages: Sequence[tuple[str, bool]]
    """Name of each stage, and whether it has run."""
    sections: Sequence[Section]
