"""Everything the doctor looks at, in order."""

from collections.abc import Iterator
from pathlib import Path

from tinyllm import paths
from tinyllm.doctor.finding import Finding, problem
from tinyllm.doctor.leftovers import examine_cache, examine_repository
from tinyllm.doctor.machine import examine_machine, examine_operations
from tinyllm.doctor.trainers import examine_trainers
from tinyllm.errors import TinyllmError
from tinyllm.preset import check_params


def examine(root: Path, *, verify_cache: bool) -> Iterator[Finding]:
    """Yield all findings; nothing is changed.

    Args:
        root: the folder of dvc.yaml.
        verify_cache: also read DVC's whole cache.
    """
    yield from examine_machine(root)
    yield from examine_operations()
    yield from _examine_params(root / paths.PARAMS)
    yield from examine_repository(root)
    yield from examine_trainers(root / paths.inflight_root())
    if verify_cache:
        yield from examine_cache(root)


def _examine_params(path: Path) -> Iterator[Finding]:
    """Check every section as the stages would."""
    try:
        n_sections = check_params(path)
    except TinyllmError as error:
        for line in str(error).splitlines():
            yield problem("parameters", line, f"edit {path.name}, or git restore {path.name}")
        return
    yield Finding(section="parameters", text=f"{path}: {n_sections} sections are valid")
