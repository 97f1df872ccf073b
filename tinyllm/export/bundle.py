"""Writes everything that an export holds; `proof.py` then compares it with our own model.

hf/     for transformers
onnx/   model.onnx, model_int8.onnx, and what a tokenizer and a chat need
"""

import shutil
from pathlib import Path

from tinyllm.artifact import load_manifest
from tinyllm.export.card import model_card
from tinyllm.export.formats import HF, ONNX, ONNX_FLOAT, ONNX_INT8
from tinyllm.export.hf import write_hf
from tinyllm.export.onnx import export_onnx
from tinyllm.export.onnx_int8 import quantize_onnx
from tinyllm.export.params import ExportParams
from tinyllm.model.directory import load_model
from tinyllm.model.init import count_parameters
from tinyllm.progress import Progress


def write_bundle(source: Path, directory: Path, params: ExportParams, progress: Progress) -> None:
    """Write all formats of a float model directory.

    Args:
        source: the model directory.
        directory: an artifact's draft.
        params: which formats, and how.
        progress: told what is written.
    """
    model, manifest = load_model(source), load_manifest(source)
    facts = {name: value for name, value in manifest.info.items() if type(value) in (int, float)}
    card = model_card(model.config, count_parameters(model), manifest, facts)
    progress.say("writing the Hugging Face folder")
    write_hf(source, directory / HF, card)
    (directory / ONNX).mkdir()
    progress.say(f"writing ONNX, opset {params.opset}")
    export_onnx(model, directory / ONNX_FLOAT, params.opset)
    if params.onnx_int8:
        quantize_onnx(directory / ONNX_FLOAT, directory / ONNX_INT8)
    for path in sorted((directory / HF).iterdir()):
        if path.suffix in {".json", ".jinja"}:
            shutil.copyfile(path, directory / ONNX / path.name)
