"""The mistakes a user can make or meet, each told in one line.

A `TinyllmError` is a wrong input, a damaged file or a missing resource: the command line prints
its message and exits with code 2. Anything else that is raised is a bug of ours and keeps its
traceback.
"""


class TinyllmError(Exception):
    """Base of all mistakes; the message says what is wrong, where, and what to do."""


class ParamsError(TinyllmError):
    """Parameters that are unknown, missing, ill-typed or refused; one line per problem."""


class SourceError(TinyllmError):
    """A corpus source that cannot be fetched or is not what its hash promised."""


class DataError(TinyllmError):
    """Text, conversations or tokens that are damaged, empty or too small for their use."""


class ArtifactError(TinyllmError):
    """An artifact that is missing, incomplete or not as its manifest says."""


class LineageError(ArtifactError):
    """Artifacts that were made from different ancestors; the message has both digests."""


class TrainingError(TinyllmError):
    """A training run that cannot start or go on: loss not finite, state in use."""


class GateError(TinyllmError):
    """A result that is worse than the limit its stage promises."""


class Interrupted(TinyllmError):  # noqa: N818 - no error: it was asked for
    """A piece of work that was asked to stop, and stopped in good order."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
        """Exit code: 128 and the number of the signal, as shells count."""
