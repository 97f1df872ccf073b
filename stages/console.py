"""Progress for people: one live bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINE_INTERVAL_S = 10.0


class ConsoleProgress:
    """A `tinyllm.progress.Progress` that writes to stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task: tuple[str, TaskID] | None = None
        self._began: dict[str, tuple[float, int]] = {}
        """Of each task: when it was first heard of, and how much was done by then."""
        self._last_line_s = 0.0

    def say(self, message: str) -> None:
        """Print one line that stays, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False)
        else:
            self._console.print(message, markup=False, soft_wrap=True)
        sys.stderr.flush()

    def step(self, task: str, done: int, total: int, **figures: float) -> None:
        """Move the bar of `task`; without a terminal print a line now and then, and at the end."""
        if self._console.is_terminal:
            self._move_bar(task, done, total, figures)
            return
        now = time.monotonic()
        began_s, began_at = self._began.setdefault(task, (now, done))
        if done < total and now - self._last_line_s < LINE_INTERVAL_S:
            return
        self._last_line_s = now
        left = ""
        if began_at < done < total:
            left = f"  {(now - began_s) / (done - began_at) * (total - done):.0f} s left"
        self.say(f"{task} {done}/{total}  {_format(figures)}{left}".rstrip())

    def _move_bar(self, task: str, done: int, total: int, figures: dict[str, float]) -> None:
        """Show the task in the live bar; a new task replaces a finished one."""
        if self._bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                _Figures(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
        if self._task is None or self._task[0] != task:
            self._task = (task, self._bar.add_task(task, total=total, completed=done, figures=""))
        self._bar.update(self._task[1], completed=done, total=total, figures=_format(figures))
        if done >= total:
            self._bar.stop()
            self._bar = self._task = None


class _Figures(ProgressColumn):
    """The numbers beside the bar."""

    def render(self, task: Task) -> Text:
        """Return the formatted figures of the task."""
        return Text(str(task.fields.get("figures", "")), style="cyan")


def _format(figures: dict[str, float]) -> str:
    """Return `name value` pairs with sensible digits."""
    return "  ".join(
        f"{name} {value:,.0f}" if abs(value) >= 1000 else f"{name} {value:.4g}"
        for name, value in figures.items()
    )
