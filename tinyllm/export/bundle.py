"""Everything that an export holds, written and then proven.

hf/     for transformers
onnx/   model.onnx, model_int8.onnx, and what a tokenizer and a chat need
gguf/   model_f32.gguf, ..., each whole in itself, for llama.cpp
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tinyllm.artifact import load_manifest
from tinyllm.export.card import model_card
from tinyllm.export.gguf import write_gguf
from tinyllm.export.gguf_layout import gguf_refusal
from tinyllm.export.hf import write_hf
from tinyllm.export.hf_runtime import TransformersModel
from tinyllm.export.onnx import export_onnx
from tinyllm.export.onnx_int8 import quantize_onnx
from tinyllm.export.params import ExportParams, GgufType
from tinyllm.export.runtime import OnnxModel
from tinyllm.export.verify import (
    Parity,
    TextParity,
    build_references,
    compare,
    compare_text,
    cut_prompts,
)
from tinyllm.model.directory import load_config, load_model
from tinyllm.model.init import count_parameters
from tinyllm.progress import Progress
from tinyllm.tokenizer.chat import ChatTemplate, Message
from tinyllm.tokenizer.special import SPECIAL_TOKENS
from tinyllm.tokenizer.tokenizer import Tokenizer

HF, ONNX = "hf", "onnx"
ONNX_FLOAT, ONNX_INT8 = f"{ONNX}/model.onnx", f"{ONNX}/model_int8.onnx"
GGUF: dict[GgufType, str] = {
    "f32": "gguf/model_f32.gguf",
    "f16": "gguf/model_f16.gguf",
    "q8_0": "gguf/model_q8_0.gguf",
}
MAX_TEXT = 100_000
"""Characters of a text that tokenizers are compared on; every branch of the split occurs in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """The parity table of an export."""

    runtimes: dict[str, Parity]
    """By format: transformers, onnx and, if it was written, onnx_int8."""
    text: TextParity
    """Of the tokenizer and the chat template in transformers."""

    @property
    def exact(self) -> dict[str, Parity]:
        """The runtimes that must agree with ours; 8-bit weights are another model."""
        return {name: parity for name, parity in self.runtimes.items() if name != "onnx_int8"}

    def to_metrics(self) -> dict[str, Any]:
        """Return the numbers by format; differences with the digits that mean something."""
        rows = {name: asdict(parity) for name, parity in self.runtimes.items()}
        for row in rows.values():
            for name, value in row.items():
                row[name] = float(f"{value:.3g}") if "diff" in name or "margin" in name else value
        return {**rows, "text": asdict(self.text)}


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
    _write_ggufs(source, directory, params, progress)


def _write_ggufs(source: Path, directory: Path, params: ExportParams, progress: Progress) -> None:
    """Write the GGUF files; say why where llama.cpp has no such architecture."""
    reason = gguf_refusal(load_config(source)[0])
    if params.gguf and reason:
        progress.say(f"no GGUF file: {reason}")
        return
    for kind in params.gguf:
        progress.say(f"writing {GGUF[kind]}")
        (directory / GGUF[kind]).parent.mkdir(exist_ok=True)
        write_gguf(source, directory / GGUF[kind], kind)


def prove_bundle(
    source: Path,
    directory: Path,
    texts: Sequence[str],
    params: ExportParams,
    progress: Progress,
) -> Proof:
    """Run every format beside our own model.

    Args:
        source: the model directory that was exported.
        directory: what `write_bundle` wrote.
        texts: held-out text, at least one.
        params: how much to compare.
        progress: told what is compared.
    """
    model, tokenizer = load_model(source), Tokenizer.load(source)
    template = ChatTemplate.load(source)
    longest = model.config.max_seq_len // 2
    texts = [text[:MAX_TEXT] for text in texts]
    prompts = cut_prompts(
        tokenizer.encode_batch(texts), params.prompts, min(params.prompt_tokens, longest)
    )
    chats = _chats([tokenizer.decode(prompt) for prompt in prompts])
    greeting, _ = template.encode(chats[0], tokenizer, add_generation_prompt=True)
    theirs = TransformersModel(directory / HF)
    with _one_thread():
        references = build_references(model, [*prompts, greeting[:longest]], params.greedy_tokens)
        progress.say("comparing transformers")
        runtimes = {"transformers": compare(references, theirs)}
        for name, file in {"onnx": ONNX_FLOAT, "onnx_int8": ONNX_INT8}.items():
            if (directory / file).is_file():
                progress.say(f"comparing {file} in ONNX Runtime")
                runtimes[name] = compare(references, OnnxModel(directory / file, n_threads=1))
    return Proof(runtimes=runtimes, text=compare_text(tokenizer, template, texts, chats, theirs))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one core: single tokens gain nothing from more, and rounding is then the same."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _chats(passages: Sequence[str]) -> list[list[Message]]:
    """Return a greeting, and conversations of every role about the passages."""
    chats = [[Message("user", "Hello! How are you?")]]
    for passage in passages:
        if any(token in passage for token in SPECIAL_TOKENS):
            continue  # transformers would take it for a special token in a message; we never do
        chats.append([Message("user", passage)])
        chats.append(
            [
                Message("system", "Answer in one line."),
                Message("user", passage),
                Message("assistant", f"  {passage}\n"),
                Message("user", "Thanks, «friend» 🙂"),
            ]
        )
    return chats
