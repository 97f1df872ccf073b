"""Writes everything that an export holds; `proof.py` then compares it with our own model.

hf/     for transformers
peft/   the adapter and its base, for peft
onnx/   model.onnx in fp32, fp16 and 8 bits (two forms), fixed sizes in static/, and what
        a tokenizer, a chat and ONNX Runtime GenAI need
gguf/   model_f32.gguf, ..., each whole in itself, for llama.cpp
"""

import shutil
from pathlib import Path
from typing import NamedTuple

from tinyllm.artifact import load_manifest, write_json
from tinyllm.export.card import model_card
from tinyllm.export.families import hf_config, hf_refuses
from tinyllm.export.formats import (
    GGUF,
    HF,
    ONNX,
    ONNX_FLOAT,
    ONNX_FP16,
    ONNX_INT8,
    ONNX_QDQ,
    ONNX_STATIC,
    PEFT,
)
from tinyllm.export.genai import GENAI_CONFIG, genai_config, genai_refuses
from tinyllm.export.gguf import write_gguf
from tinyllm.export.gguf_layout import gguf_refusal
from tinyllm.export.hf import generation_config, special_ids, tokenizer_config, write_hf
from tinyllm.export.onnx import export_onnx
from tinyllm.export.onnx_fp16 import to_fp16
from tinyllm.export.onnx_int8 import quantize_onnx
from tinyllm.export.onnx_qdq import quantize_qdq
from tinyllm.export.onnx_static import export_static
from tinyllm.export.params import ExportParams
from tinyllm.export.peft_folder import peft_refuses, write_peft
from tinyllm.model.directory import CONFIG, COPIED, load_model
from tinyllm.model.init import count_parameters
from tinyllm.model.sizes import ModelConfig
from tinyllm.progress import Progress


class Adapter(NamedTuple):
    """A LoRA adapter whose merged model is exported."""

    base: Path
    """The model directory it was trained on."""
    folder: Path
    """The `adapter` artifact."""


def write_bundle(
    source: Path,
    directory: Path,
    params: ExportParams,
    progress: Progress,
    adapter: Adapter | None = None,
) -> dict[str, str]:
    """Write all formats that can hold a float model directory; the table names the others.

    Args:
        source: the model directory.
        directory: an artifact's draft.
        params: which formats, and how.
        progress: told what is written.
        adapter: also written for peft, with its base.

    Returns:
        What this adapter cannot be written for, by format: why.
    """
    skipped = {}
    model, manifest = load_model(source), load_manifest(source)
    facts = {name: value for name, value in manifest.info.items() if type(value) in (int, float)}
    card = model_card(model.config, count_parameters(model), manifest, facts)
    if hf_refuses(model.config) is None:
        progress.say("writing the Hugging Face folder")
        write_hf(source, directory / HF, card)
    if adapter is not None:
        if reason := peft_refuses(model.config, adapter.folder):
            skipped["peft"] = f"not supported: {reason}"
        else:
            write_peft(*adapter, directory / PEFT, card)
    (directory / ONNX).mkdir()
    progress.say(f"writing ONNX, opset {params.opset}")
    export_onnx(model, directory / ONNX_FLOAT, params.opset)
    if params.onnx_fp16:
        to_fp16(directory / ONNX_FLOAT, directory / ONNX_FP16)
    if params.onnx_int8:
        quantize_onnx(directory / ONNX_FLOAT, directory / ONNX_INT8)
        quantize_qdq(directory / ONNX_FLOAT, directory / ONNX_QDQ)
    if params.onnx_static is not None:
        progress.say(f"writing ONNX of fixed sizes, chunks of {params.static_chunk} tokens")
        (directory / ONNX_STATIC).mkdir()
        export_static(
            model,
            directory / ONNX_STATIC,
            opset=params.opset,
            chunk=params.static_chunk,
            writes=params.onnx_static,
        )
    _write_beside_graphs(source, model.config, directory / ONNX)
    if gguf_refusal(model.config) is None:
        for kind in params.gguf:
            progress.say(f"writing {GGUF[kind]}")
            (directory / GGUF[kind]).parent.mkdir(exist_ok=True)
            write_gguf(source, directory / GGUF[kind], kind)
    return skipped


def _write_beside_graphs(source: Path, config: ModelConfig, folder: Path) -> None:
    """Write what users of the graphs need: tokenizer, chat template, configurations."""
    for name in COPIED:
        shutil.copyfile(source / name, folder / name)
    if hf_refuses(config) is None:
        write_json(folder / CONFIG, {**hf_config(config), **special_ids()})
    write_json(folder / "generation_config.json", generation_config())
    write_json(folder / "tokenizer_config.json", tokenizer_config(config))
    if genai_refuses(config) is None:
        write_json(folder / GENAI_CONFIG, genai_config(config, Path(ONNX_FLOAT).name))
