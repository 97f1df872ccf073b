"""A conversation on a terminal or through a pipe: questions in, answers as they come.

Which model answers and how is the business of `cli.py`.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import typer

from tinyllm.errors import TinyllmError

if TYPE_CHECKING:  # torch takes two seconds: imported when used
    from tinyllm.inference.conversation import Conversation
    from tinyllm.inference.sampling import SamplingParams


def questions() -> Iterator[str]:
    """Yield what the user types, or the lines of a pipe, until the end or Ctrl-C."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - gives `input` line editing and history
    # Below a script's background job SIGINT is ignored, and Ctrl-C would do nothing here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        try:
            yield input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # we leave already: it takes a moment
            typer.echo()
            return


def answer(conversation: "Conversation", question: str, sampling: "SamplingParams") -> None:
    """Print an answer as it comes; on a terminal Ctrl-C and a mistake end only the answer."""
    try:
        show(conversation.ask(question, sampling))
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        typer.echo()
    except TinyllmError as error:
        if not sys.stdin.isatty():
            raise
        typer.echo(f"error: {error}", err=True)


def show(pieces: Iterator[str]) -> None:
    """Print pieces of text as they come."""
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()
