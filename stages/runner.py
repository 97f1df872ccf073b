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
from stages.ranks import hand_over, is_main, ranks_wanted, start_ranks
from tinyllm.errors import Interrupted, TinyllmError
from tinyllm.progress import Progress, Silent

USER_MISTAKE = 2
_RESOURCE_ERRORS = {
    errno.ENOSPC: "no space left on the disk; free some and run again",
    errno.EDQUOT: "the disk quota is used up; free some and run again",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
}


def run_stage(function: Callable[[], None], *, on_ranks: bool = False) -> None:
    """Run a stage as a command without options; its docstring is the help text.

    Args:
        function: the work; its name is the stage's.
        on_ranks: the stage trains, so `TINYLLM_NPROC` processes may share the work.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    def command() -> None:
        """Run the stage here, or start the ranks that do."""
        if on_ranks and (n_ranks := ranks_wanted()):
            start_ranks(f"stages.{function.__name__}", n_ranks)
        function()

    app.command(function.__name__, help=function.__doc__)(command)
    with mistakes_in_one_line():
        _refuse_foreign_code()
        app()


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Turn a user's mistake into one line on stderr and exit code 2; bugs keep a traceback."""
    try:
        yield
    except Interrupted as error:  # every rank raises it, for the same reason
        _leave(str(error) if is_main() else "", error.code)
    except TinyllmError as error:
        _leave(str(error))
    except KeyboardInterrupt:
        _leave("interrupted", 128 + signal.SIGINT)
    except OSError as error:
        if error.errno not in _RESOURCE_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _leave(where + _RESOURCE_ERRORS[error.errno])


def console_progress() -> Progress:
    """Return the progress of this process: a bar on a terminal, plain lines elsewhere.

    Of several ranks only the first is heard.
    """
    return ConsoleProgress() if is_main() else Silent()


def _leave(message: str, code: int = USER_MISTAKE) -> None:
    """Print each line of the message as an error and exit; a rank's launcher does that for it."""
    if code == USER_MISTAKE and hand_over(message):
        raise SystemExit(code)
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
