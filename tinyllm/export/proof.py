"""The parity table: every format of an export, run beside our own model on held-out text."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tinyllm.errors import DataError
from tinyllm.export.formats import FORMATS
from tinyllm.export.our_runtime import OurModel
from tinyllm.export.params import ExportParams
from tinyllm.export.verify import (
    ChatRuntime,
    Parity,
    Reference,
    TextParity,
    TextRuntime,
    build_references,
    compare,
    compare_text,
    count_unequal,
    cut_prompts,
)
from tinyllm.model.directory import load_model
from tinyllm.model.transformer import Transformer
from tinyllm.progress import Progress
from tinyllm.quantization.directory import weight_bits
from tinyllm.quantization.int8 import quantize_model
from tinyllm.quantization.load import load_any_model
from tinyllm.tokenizer.chat import ChatTemplate, Message
from tinyllm.tokenizer.special import SPECIAL_TOKENS
from tinyllm.tokenizer.tokenizer import Tokenizer

MAX_TEXT = 100_000
"""Characters of a text that tokenizers are compared on; every branch of the split occurs in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One runtime in the parity table."""

    parity: Parity
    exact: bool
    """It must agree with ours; other precisions are other models."""
    file_bytes: int
    """Of its files; of our own models, of the weights in memory."""
    unequal_texts: int | None
    """Texts that its tokenizer encodes otherwise than ours; None: it has no tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """The parity table of an export."""

    rows: dict[str, Row]
    """By format, in the order of the table."""
    missing: dict[str, str]
    """By format: why it was not compared; never to be taken for passed."""
    text: TextParity | None
    """Of tokenizer and chat template in transformers; None where transformers was not compared."""

    @property
    def exact(self) -> dict[str, Parity]:
        """The runtimes that must agree with ours."""
        return {name: row.parity for name, row in self.rows.items() if row.exact}

    def to_metrics(self, *, speeds: bool = False) -> dict[str, Any]:
        """Return the numbers by format; differences with the digits that mean something.

        Args:
            speeds: also tokens per second. Metrics in Git have none: it belongs to the machine.
        """
        table: dict[str, Any] = {}
        for name, row in self.rows.items():
            numbers = asdict(row.parity)
            if not speeds:
                del numbers["tokens_per_s"]
            for key in ("max_logit_diff", "max_cached_logit_diff", "divergence_margin", "kl"):
                numbers[key] = float(f"{numbers[key]:.3g}")
            table[name] = {**numbers, "file_bytes": row.file_bytes}
            if row.unequal_texts is not None:
                table[name]["unequal_texts"] = row.unequal_texts
        missing = {name: {"missing": reason} for name, reason in self.missing.items()}
        text = {} if self.text is None else {"text": asdict(self.text)}
        return {**table, **missing, **text}


def prove_bundle(
    source: Path,
    directory: Path,
    texts: Sequence[str],
    params: ExportParams,
    progress: Progress,
    skipped: Mapping[str, str] | None = None,
    quantized: Path | None = None,
) -> Proof:
    """Run every format beside our own model.

    Args:
        source: the model directory that was exported.
        directory: what `write_bundle` wrote.
        texts: held-out text, at least one.
        params: how much to compare.
        progress: told what is compared.
        skipped: formats that `write_bundle` could not write, with the reason.
        quantized: our quantised model's directory; None: it is made here, in INT8 and without a
            sample.
    """
    model, tokenizer = load_model(source), Tokenizer.load(source)
    template = ChatTemplate.load(source)
    longest = model.config.max_seq_len // 2
    texts = [text[:MAX_TEXT] for text in texts]
    encoded = list(zip(texts, tokenizer.encode_batch(texts), strict=True))
    prompts = cut_prompts(
        [ids for _, ids in encoded], params.prompts, min(params.prompt_tokens, longest)
    )
    chats = _chats([tokenizer.decode(prompt) for prompt in prompts])
    greeting, _ = template.encode(chats[0], tokenizer, add_generation_prompt=True)
    missing = dict(skipped or {})
    text = None
    with _one_thread():
        references = build_references(model, [*prompts, greeting[:longest]], params.greedy_tokens)
        rows, unsupported = _our_rows(model, quantized, references)
        missing |= unsupported
        for kind in FORMATS:
            path = directory / kind.file
            if reason := kind.refuses(model.config):
                missing[kind.name] = f"not supported: {reason}"
            elif path.exists() and not kind.is_installed():
                missing[kind.name] = f"not installed: {kind.module}"
            elif path.exists():
                progress.say(f"comparing {kind.name}")
                runtime, unequal = kind.open(path), None
                if isinstance(runtime, ChatRuntime) and text is None:
                    text = compare_text(tokenizer, template, texts, chats, runtime)
                    unequal = text.unequal_texts
                elif isinstance(runtime, TextRuntime):
                    unequal = count_unequal(encoded, runtime)
                rows[kind.name] = Row(
                    parity=compare(references, runtime),
                    exact=kind.exact,
                    file_bytes=_file_bytes(path),
                    unequal_texts=unequal,
                )
    return Proof(rows=rows, missing=missing, text=text)


def _our_rows(
    model: Transformer, quantized: Path | None, references: Sequence[Reference]
) -> tuple[dict[str, Row], dict[str, str]]:
    """Return the rows of our model and of the quantised one, or why that is missing."""
    rows = {"ours": _our_row(references, OurModel(model), exact=True)}
    try:
        rounded = quantize_model(model) if quantized is None else load_any_model(quantized)
    except DataError as error:
        return rows, {"ours_int8": f"not supported: {error}"}
    name = f"ours_int{weight_bits(rounded)}"
    return {**rows, name: _our_row(references, OurModel(rounded), exact=False)}, {}


def _our_row(references: Sequence[Reference], ours: OurModel, *, exact: bool) -> Row:
    parity = compare(references, ours)
    return Row(parity=parity, exact=exact, file_bytes=ours.n_bytes, unequal_texts=None)


def _file_bytes(path: Path) -> int:
    """Return the size of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


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
