"""One line of what the doctor sees."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A fact, or a problem with its repair."""

    section: str
    """Where it belongs: machine, operations, parameters, dvc."""
    text: str
    """What there is."""
    is_problem: bool = False
    """Whether something should be done."""
    repair: str = ""
    """The command that does it."""


def problem(section: str, text: str, repair: str) -> Finding:
    """Return a finding that asks for a repair."""
    return Finding(section=section, text=text, is_problem=True, repair=repair)
