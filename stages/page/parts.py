"""Small builders that every chapter uses."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from stages.page.blocks import Block, Cell, Figure, Figures, Sample, Samples, Table, Talk, Talks
from stages.page.facts import Facts
from stages.page.numbers import flatten, show

ENDED = " ■"
"""Ends a sampled answer whose turn the model ended itself."""
CUT = " …"
"""Ends one that was cut."""
ROWS = (
    *("train", "val", "sft · train", "sft · val", "lora · train", "lora · val"),
    *("pretrain", "sft", "lora", "lora_bf16", "int8", "int4"),
    *("ours", "ours_int8", "ours_int4", "transformers", "peft"),
    *("onnx", "onnx_static", "onnx_static_fp16", "onnx_fp16", "onnx_int8", "onnx_qdq"),
    *("onnx_genai", "gguf_f32", "gguf_f16", "gguf_q8_0"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
)
"""The order of rows; JSON files have theirs by name."""
_QUESTION = re.compile(r"(?:\A|\n\n)> (.*)\n")


def figures(facts: Facts, stage: str, first: Sequence[str]) -> list[Block]:
    """Return a stage's numbers: the named ones in their order, then whatever else it told."""
    leaves = dict(flatten(facts.metrics.get(stage, {})))
    order = [name for name in first if name in leaves]
    order += [name for name in leaves if name not in order]
    items = [Figure(name, show(name, leaves[name])) for name in order if is_number(leaves[name])]
    return [Figures(items)] if items else []


def is_number(value: Any) -> bool:
    """Return whether a metric is a number (or absent: NaN was not JSON)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def counts(caption: str, heading: str, values: Mapping[str, Any]) -> list[Block]:
    """Return a table of counts with bars, largest first; nothing if there are none."""
    numbers = {name: value for name, value in flatten(values) if is_number(value)}
    if not numbers:
        return []
    largest = max(numbers.values()) or 1
    rows = [
        [Cell(name, is_number=False), Cell(show("", value), share=value / largest)]
        for name, value in sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
    ]
    return [Table((heading, "count"), rows, caption)]


def comparison(
    rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str], *, bars: Sequence[str] = ()
) -> Table:
    """Return a table with a row per name.

    Args:
        rows: metrics by the row's name; rows that `ROWS` names come first, in its order.
        columns: heading by metric; a column that no row has is left out.
        bars: metrics with a bar behind the number, as long as its share of the largest.
    """
    ordered = [name for name in ROWS if name in rows] + [name for name in rows if name not in ROWS]
    kept = {
        key: title for key, title in columns.items() if any(key in row for row in rows.values())
    }
    largest = {key: max((row.get(key) or 0 for row in rows.values()), default=0) for key in bars}
    table = []
    for name in ordered:
        row = rows[name]
        cells = [Cell(name, is_number=False)]
        for key in kept:
            value = row.get(key)
            has_bar = largest.get(key) and is_number(value)
            cells.append(Cell(show(key, value), share=value / largest[key] if has_bar else None))  # type: ignore[operator]
        table.append(cells)
    return Table(("", *kept.values()), table)


def texts(facts: Facts, stage: str) -> list[Block]:
    """Return what a model wrote early, midway and at the end."""
    samples = facts.samples.get(stage, [])
    if not samples:
        return []
    chosen = sorted({0, len(samples) // 2, len(samples) - 1})
    return [Samples([Sample(f"step {samples[i]['step']}", samples[i]["text"]) for i in chosen])]


def talks(facts: Facts, stage: str) -> list[Block]:
    """Return the answers of the first and the last sample to the same questions."""
    samples = facts.samples.get(stage, [])
    if not samples:
        return []
    before, after = (dict(_answers(samples[i]["text"])) for i in (0, -1))
    items = [
        Talk(
            question,
            _bare(before.get(question, "")),
            _bare(after[question]),
            before.get(question, "").endswith(ENDED),
            after[question].endswith(ENDED),
        )
        for question in after
    ]
    return [Talks(items)] if items else texts(facts, stage)


def _answers(text: str) -> list[tuple[str, str]]:
    r"""Return (question, answer) of a sample of the form `> question`, answer, empty line, ...

    >>> _answers("> a?\nb ■\n\n> c?\nd …")
    [('a?', 'b ■'), ('c?', 'd …')]
    """
    pieces = _QUESTION.split(text)
    return list(zip(pieces[1::2], pieces[2::2], strict=True))


def _bare(answer: str) -> str:
    return answer.removesuffix(ENDED).removesuffix(CUT)
