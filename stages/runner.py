"""What every command does around its work: mistakes in one line, progress, the right code.

A stage calls `run_stage(function)` under `__main__` and asks `console_progress()` for its progress.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

import tinyllm
from stages.console import ConsoleProgress
from tinyllm.errors import Interrupted, TinyllmError

USER_MISTAKE = 2
_RESOURCE_ERRORS = {
    errno.ENOSPC: "no space left on the disk; free some and run again",
    errno.EDQUOT: "the disk quota is used up; free some and run again",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
}


def run_stage(function: Callable[[], None]) -> None:
    """Run a stage as a command without options; its docstring is the help text."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=function.__doc__)(function)
    with mistakes_in_one_line():
        _refuse_foreign_code()
        app()


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Turn a user's mistake into one line on stderr and exit code 2; bugs keep a traceback."""
    try:
        yield
    except Interrupted as error:
        _leave(str(error), error.code)
    except TinyllmError as error:
        _leave(str(error))
    except KeyboardInterrupt:
        _leave("interrupted", 128 + signal.SIGINT)
    except OSError as error:
        if error.errno not in _RESOURCE_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _leave(where + _RESOURCE_ERRORS[error.errno])


def console_progress() -> ConsoleProgress:
    """Return the progress of this process: a bar on a terminal, plain lines elsewhere."""
    return ConsoleProgress()


def _leave(message: str, code: int = USER_MISTAKE) -> None:
    """Print each line of the message as an error and exit."""
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)  # noqa: T201 - the one place that prints mistakes
    raise SystemExit(code)


def _refuse_foreign_code() -> None:
    """Refuse another checkout's tinyllm: a temporary experiment would test the wrong code."""
    here = Path(tinyllm.__file__).resolve()
    if "DVC_STAGE" in os.environ and not here.is_relative_to(Path.cwd().resolve()):
        raise TinyllmError(
            f"{here.parent}: this tinyllm is not the one of {Path.cwd()};"
            " run `python -m stages.<name>` there"
        )
