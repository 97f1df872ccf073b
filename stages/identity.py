"""What makes one training run the same as another: parameters, inputs, code, torch.

Runs of the same identity share a stored state (`tinyllm/training/state.py`): the second resumes the
first. Anything else that changes, and a run begins anew.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tinyllm.artifact import digest_json, file_sha256, load_manifest
from tinyllm.params import read_yaml, to_plain
from tinyllm.training.params import NOT_TRAJECTORY

FORMAT = 1
PIPELINE = Path("dvc.yaml")
CODE = ("stages/", "tinyllm/")


def identity(stage: str, params: Any, inputs: Sequence[Path]) -> dict[str, Any]:
    """Return the identity of a training run as JSON values.

    Args:
        stage: its name in dvc.yaml, which lists the code it depends on.
        params: the dataclass of the sections it reads.
        inputs: the artifacts it starts from; their manifests stand for them.

    Raises:
        ArtifactError: an input has no readable manifest.
    """
    dependencies = read_yaml(PIPELINE)["stages"][stage]["deps"]
    code = [path for path in dependencies if path.startswith(CODE)]
    return {
        "format": FORMAT,
        "stage": stage,
        "params": trajectory(params),
        "inputs": {path.as_posix(): load_manifest(path).digest for path in inputs},
        "code": {path: _code_digest(Path(path)) for path in code},
        "torch": torch.__version__,
    }


def trajectory(params: Any) -> Any:
    """Return parameters as plain values without those that only change what is told and stored."""
    plain = to_plain(params)
    if not isinstance(plain, Mapping):
        return plain
    return {name: trajectory(item) for name, item in plain.items() if name not in NOT_TRAJECTORY}


def _code_digest(path: Path) -> str:
    """Return one digest of a source file, or of all sources below a folder."""
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    return digest_json({file.as_posix(): file_sha256(file) for file in files})
