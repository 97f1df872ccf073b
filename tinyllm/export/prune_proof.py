"""Proof that a pruned checkpoint says the same as before, on text whose tokens all stay."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from tinyllm.errors import GateError
from tinyllm.export.pruned_tokenizer import PrunedTokenizer

WINDOW, N_WINDOWS = 256, 4
"""Tokens and number of the passages on which logits are compared."""
BAR = 1e-5
"""Largest difference as a share of the largest logit: rounding of fp32 sums in another order."""


class Tokens(NamedTuple):
    """What was encoded with both tokenizers."""

    n_after: int
    """Tokens of the whole corpus now."""
    lines: int
    kept_lines: int
    """Lines whose tokens all stayed: each has the same tokens as before."""
    windows: list[list[int]]
    """Passages of tokens that all stayed, in old ids."""


def compare_tokens(full: Tokenizer, pruned: PrunedTokenizer, pieces: Iterable[str]) -> Tokens:
    """Encode a corpus with both tokenizers, in long pieces and line by line.

    Raises:
        GateError: text whose tokens all stayed is encoded otherwise now.
    """
    small, new_ids = Tokenizer.from_str(pruned.to_json()), pruned.new_ids
    n_after, lines, kept_lines, runs = 0, 0, 0, []
    for piece in pieces:
        texts = [piece, *piece.splitlines(keepends=True)]
        before = full.encode_batch(texts, add_special_tokens=False)
        after = small.encode_batch(texts, add_special_tokens=False)
        for text, old, new in zip(texts, before, after, strict=True):
            moved = [new_ids.get(i) for i in old.ids]
            if None not in moved and moved != new.ids:
                raise GateError(f"prune-hf: other tokens than before for {text[:40]!r}; a bug")
            kept_lines += None not in moved
        n_after += len(after[0].ids)
        lines += len(texts) - 1
        kept_lines -= not set(before[0].ids) - set(new_ids)  # the piece itself is no line
        runs += _kept_runs(before[0].ids, new_ids)
    longest = sorted(runs, key=len, reverse=True)[:N_WINDOWS]
    return Tokens(n_after, lines, kept_lines, longest)


def _kept_runs(ids: Sequence[int], kept: dict[int, int]) -> list[list[int]]:
    """Return runs of ids that all stay, cut at `WINDOW`."""
    runs: list[list[int]] = [[]]
    for i in ids:
        if i not in kept or len(runs[-1]) == WINDOW:
            runs.append([])
        if i in kept:
            runs[-1].append(i)
    return [run for run in runs if run]


@torch.inference_mode()
def compare_logits(
    folder: Path, out: Path, pruned: PrunedTokenizer, windows: Sequence[list[int]]
) -> tuple[int, float]:
    """Return the positions compared, and the largest |difference| of a kept token's logit.

    Args:
        folder: before.
        out: after.
        pruned: how ids moved.
        windows: passages in old ids.

    Raises:
        GateError: the logits differ by more than rounding.
    """
    rows = torch.tensor(pruned.kept)
    model = _load(folder)
    longest = getattr(model.config, "max_position_embeddings", WINDOW)
    windows = [window[:longest] for window in windows]
    before = [model(torch.tensor([ids])).logits[0][:, rows] for ids in windows]
    model = _load(out)
    n, worst, largest = 0, 0.0, 0.0
    for ids, expected in zip(windows, before, strict=True):
        logits = model(torch.tensor([pruned.moved(list(ids))])).logits[0]
        worst = max(worst, (logits - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
        n += len(ids)
    if not worst <= BAR * largest:
        raise GateError(
            f"prune-hf: logits differ by {worst:.2g} of {largest:.2g} on kept text; is there a"
            " table with a row per token that is neither embedding nor head?"
        )
    return n, worst


def _load(folder: Path) -> Any:
    """Return the checkpoint in transformers, in fp32; never from a pickle."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    model.train(False)
    return model
