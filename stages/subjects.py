"""What the benchmark measures: every model of the pipeline, by the name of its row."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tinyllm import paths
from tinyllm.evaluation.runners import TorchRunner
from tinyllm.evaluation.speed import Subject
from tinyllm.export.formats import ONNX_FLOAT, ONNX_INT8
from tinyllm.export.runtime import OnnxModel
from tinyllm.model.directory import WEIGHTS, stored_as


class OnnxRunner:
    """An exported ONNX file as the benchmark wants it: a `tinyllm.evaluation.runners.Runner`."""

    def __init__(self, path: Path, n_threads: int) -> None:
        self._model = OnnxModel(path, n_threads=n_threads)
        self._past = self._model.empty_past(1)
        self.rope_cos = torch.zeros(())  # ONNX Runtime computes on the CPU

    def prefill(self, ids: Sequence[int]) -> int:
        """Pass the prompt and keep its keys and values."""
        self._past = self._model.empty_past(1)
        return self._next(ids)

    def decode(self, token: int) -> int:
        """Pass one token."""
        return self._next([token])

    def full(self, ids: Sequence[int]) -> int:
        """Pass everything again; the graph always gives a cache, here it is dropped."""
        return int(self._model.logits(ids)[-1].argmax())

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Return the logits."""
        past = self._model.empty_past(ids_BT.shape[0])
        return torch.from_numpy(self._model.forward(ids_BT.numpy(), past)[0])

    def _next(self, ids: Sequence[int]) -> int:
        """Return the likeliest token behind the new ones."""
        logits, self._past = self._model.forward(torch.tensor([ids]).numpy(), self._past)
        return int(logits[0, -1].argmax())


def all_subjects(device: str, n_threads: int) -> dict[str, Subject]:
    """Return the models to measure; `lora_bf16` is LoRA's with its weights rounded.

    The quantised model's row is `int8` or `int4`, by its weights.
    """
    rows: list[tuple[str, Path, torch.dtype | None]] = [
        ("pretrain", paths.PRETRAIN, None),
        ("sft", paths.SFT, None),
        ("lora", paths.LORA_MERGED, None),
        ("lora_bf16", paths.LORA_MERGED, torch.bfloat16),
        (stored_as(paths.INT8), paths.INT8, None),
    ]
    subjects = {
        name: Subject(
            open=partial(TorchRunner.open, path, dtype, device),
            file=path / WEIGHTS if dtype is None else None,
        )
        for name, path, dtype in rows
    }
    for name, file in (("onnx", ONNX_FLOAT), ("onnx_int8", ONNX_INT8)):
        path = paths.EXPORT / file
        if name == "onnx" or path.is_file():
            subjects[name] = Subject(open=partial(OnnxRunner, path, n_threads), file=path)
    return subjects
