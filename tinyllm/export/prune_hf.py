"""A smaller vocabulary for a given Hugging Face checkpoint: only what a corpus needs.

The rule is that of `tinyllm/tokenizer/prune.py`: only a token that no other merge needs may go, so
text whose tokens all stay is encoded as before. Embedding and head lose the same rows; nothing else
of the model changes, and both claims are checked on the result before it is kept. Any architecture
that transformers loads will do, with a BPE tokenizer.json and weights in safetensors.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tinyllm.artifact import write_json, write_text
from tinyllm.errors import ArtifactError, DataError
from tinyllm.export.hf_import import read_json, read_tensors
from tinyllm.export.prune_proof import compare_logits, compare_tokens
from tinyllm.export.pruned_tokenizer import PrunedTokenizer, prune_document
from tinyllm.model.directory import CONFIG, TOKENIZER, WEIGHTS

TABLES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "lm_head.weight")
"""How tensors with a row per token end, in the classes of transformers."""
SUFFIXES = (".txt", ".md", ".jsonl")
_PIECE = 1_000_000
_COPIED = ("chat_template.jinja", "special_tokens_map.json", "LICENSE", "LICENSE.txt")


@dataclass(frozen=True, kw_only=True, slots=True)
class HfPruning:
    """What was cut and what was checked."""

    tokens_before: int
    """Of the tokenizer, with its added ones."""
    tokens_after: int
    weight_bytes_before: int
    weight_bytes_after: int
    bytes_per_token_before: float
    """Of the corpus."""
    bytes_per_token_after: float
    kept_texts: int
    """Lines of the corpus whose tokens all stayed; each gets the same tokens as before."""
    texts: int
    positions: int
    """At which the logits of all kept tokens were compared."""
    max_logit_diff: float
    """Largest |difference| there."""

    def lines(self) -> list[str]:
        """Return the report for people."""
        before, after = self.bytes_per_token_before, self.bytes_per_token_after
        return [
            f"tokens {self.tokens_before:,} -> {self.tokens_after:,}",
            f"weights {self.weight_bytes_before:,} -> {self.weight_bytes_after:,} bytes",
            f"bytes per token {before:.3f} -> {after:.3f}",
            f"all tokens kept, and the same, in {self.kept_texts:,} of {self.texts:,} lines",
            f"largest |Δ logit| {self.max_logit_diff:.1e} over {self.positions:,} positions",
        ]


def prune_hf(folder: Path, corpus: Path, out: Path, vocab_size: int | None) -> HfPruning:
    """Write a Hugging Face folder with a vocabulary cut to a corpus.

    Args:
        folder: config.json, tokenizer.json and safetensors.
        corpus: a text file, or a folder of them.
        out: the new folder; it must not exist.
        vocab_size: tokens to keep at most; None: all that the corpus uses, and their ancestors.

    Raises:
        DataError: no BPE, pickled or quantised weights, or no text.
        ArtifactError: files are missing, damaged or do not fit together.
        GateError: the result does not say the same on kept text; it is removed.
    """
    if out.exists():
        raise ArtifactError(f"{out}: is there already; name a new folder")
    config, tensors = read_json(folder / CONFIG), read_tensors(folder)
    if "quantization_config" in config:
        raise DataError(f"{folder}: the weights are quantised; take the float checkpoint")
    document, full = _read_tokenizer(folder / TOKENIZER)
    pieces = list(_pieces(corpus))
    counts: Counter[int] = Counter()
    for piece in pieces:
        counts.update(full.encode(piece, add_special_tokens=False).ids)
    pruned = prune_document(document, counts, vocab_size)
    small = _cut_tables(tensors, pruned.kept, folder)
    out.mkdir(parents=True)
    try:
        safetensors.torch.save_file(small, out / WEIGHTS, metadata={"format": "pt"})
        _write_files(folder, out, config, pruned)
        tokens = compare_tokens(full, pruned, pieces)
        positions, diff = compare_logits(folder, out, pruned, tokens.windows)
    except BaseException:
        shutil.rmtree(out)
        raise
    n_bytes = sum(len(piece.encode()) for piece in pieces)
    return HfPruning(
        tokens_before=full.get_vocab_size(with_added_tokens=True),
        tokens_after=len(pruned.kept),
        weight_bytes_before=_n_bytes(tensors),
        weight_bytes_after=_n_bytes(small),
        bytes_per_token_before=n_bytes / counts.total(),
        bytes_per_token_after=n_bytes / tokens.n_after,
        texts=tokens.lines,
        kept_texts=tokens.kept_lines,
        positions=positions,
        max_logit_diff=diff,
    )


def _read_tokenizer(path: Path) -> tuple[dict[str, Any], Tokenizer]:
    """Return the content of a tokenizer.json, and the encoder made from it."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; a tokenizer.json is needed, no other form")
    try:
        return read_json(path), Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ArtifactError(f"{path}: damaged: {' '.join(str(error).split())}") from None


def _pieces(corpus: Path) -> Iterator[str]:
    """Yield the text of a file, or of all text files below a folder, in pieces of whole lines.

    Raises:
        DataError: there is none, or it is no UTF-8.
    """
    files = [corpus] if corpus.is_file() else sorted(corpus.rglob("*"))
    files = [path for path in files if path == corpus or path.suffix in SUFFIXES]
    empty = True
    for path in files:
        piece, size = [], 0
        try:
            with path.open(encoding="utf-8", newline="") as lines:
                for line in lines:
                    piece.append(line)
                    size += len(line)
                    if size >= _PIECE:
                        yield "".join(piece)
                        piece, size, empty = [], 0, False
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: no UTF-8 text: {error}") from None
        if piece:
            yield "".join(piece)
            empty = False
    if empty:
        raise DataError(f"{corpus}: no text; name a file or a folder of {', '.join(SUFFIXES)}")


def _cut_tables(
    tensors: Mapping[str, Tensor], kept: Sequence[int], folder: Path
) -> dict[str, Tensor]:
    """Return the tensors, embedding and head with the kept rows only."""
    tables = [name for name in tensors if name.endswith(TABLES)]
    if not tables:
        raise DataError(f"{folder}: has no tensor named {' or '.join(TABLES)}")
    rows = torch.tensor(kept)
    for name in tables:
        if len(tensors[name]) <= kept[-1]:
            raise ArtifactError(
                f"{folder}: {name} has {len(tensors[name])} rows, the tokenizer has token"
                f" {kept[-1]}; tokenizer and weights do not belong together"
            )
    return {name: w[rows] if name in tables else w.clone() for name, w in tensors.items()}


def _write_files(folder: Path, out: Path, config: dict[str, Any], pruned: PrunedTokenizer) -> None:
    """Write everything beside the weights, with the ids as they are now."""
    write_text(out / TOKENIZER, pruned.to_json())
    write_json(out / CONFIG, {**_moved_config(config, pruned), "vocab_size": len(pruned.kept)})
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json")
        write_json(out / "generation_config.json", _moved_config(generation, pruned))
    if (folder / "tokenizer_config.json").is_file():
        content = read_json(folder / "tokenizer_config.json")
        if decoder := content.get("added_tokens_decoder"):
            moved = {str(pruned.moved(int(i))): token for i, token in decoder.items()}
            content["added_tokens_decoder"] = moved
        write_json(out / "tokenizer_config.json", content)
    for name in _COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


def _moved_config(content: Mapping[str, Any], pruned: PrunedTokenizer) -> dict[str, Any]:
    """Return settings with the ids in them renumbered: `eos_token_id`, `suppress_tokens`, ..."""
    return {
        name: pruned.moved(value)
        if name.endswith(("_token_id", "_token_ids", "suppress_tokens"))
        else value
        for name, value in content.items()
    }


def _n_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(w.numel() * w.element_size() for w in tensors.values())
