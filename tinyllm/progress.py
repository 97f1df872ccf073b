"""How a long piece of work tells what it is doing; the terminal side lives with the stages."""

from typing import Protocol


class Progress(Protocol):
    """What the library calls while it works; cheap, because calls come once per step."""

    def say(self, message: str) -> None:
        """Tell one line that stays."""

    def step(self, task: str, done: int, total: int, **figures: float) -> None:
        """Tell that `done` of `total` units of `task` are finished, with figures by name."""


class Silent:
    """A `Progress` that tells nothing."""

    def say(self, message: str) -> None:
        """Drop the line."""

    def step(self, task: str, done: int, total: int, **figures: float) -> None:
        """Drop the figures."""
