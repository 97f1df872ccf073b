"""Makes kernels/PERF.md of the measurements in benchmarks/results; cards never run say so.

python benchmarks/perf_table.py
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TARGET = Path(__file__).parent.parent / "kernels" / "PERF.md"
CARDS = ("RTX 3060", "RTX 3090", "RTX 4090", "H100", "H200")
"""What this project is for, by a part of the name that the driver gives."""
NOT_MEASURED = "not measured"
HEAD = """# Speed of the CUDA kernels

Made by `python benchmarks/perf_table.py` of the files that `make gpu-check` writes into
`benchmarks/results`; do not edit. A share is of the ceiling that the same run measured: a large
copy for kernels that move bytes, a large bf16 product for those that multiply.
"""


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of all results; a later one of the same card replaces an earlier one."""
    newest = {result["card"]: result for result in results}
    lines = [HEAD]
    for card in CARDS:
        names = [name for name in newest if card in name]
        if not names:
            lines += [f"## {card}", "", f"{NOT_MEASURED}", ""]
    for name, result in newest.items():
        lines += [f"## {name}", "", *_card(result), ""]
    return "\n".join(lines).rstrip() + "\n"


def _card(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of one card."""
    machine, ceilings = result["machine"], result["ceilings"]
    yield f"torch {machine['torch']}, CUDA {machine['cuda']}, commit {machine['commit']}. Ceilings:"
    yield ", ".join(f"{name} {value}" for name, value in ceilings.items()) + "."
    yield ""
    yield "| kernel | size | ours, ms | of the ceiling | others, ms (ours is x times as fast) |"
    yield "|---|---|---|---|---|"
    for row in result["kernels"]:
        yield _row(row, ceilings)
    training = result["training"]
    yield ""
    yield (
        f"Pretraining, preset {training['preset']}: {training['tokens_per_s']} tokens/s,"
        f" MFU {training['mfu']:.0%}. Decoding, tokens/s: "
        + ", ".join(f"{name} {rate}" for name, rate in result["decode_tokens_per_s"].items())
        + "."
    )


def _row(row: Mapping[str, Any], ceilings: Mapping[str, float]) -> str:
    """Return the line of one kernel at one size."""
    known = ("kernel", "ms", "bytes", "flops")
    size = ", ".join(f"{name} {value}" for name, value in row.items() if name not in known)
    ours = row["ms"].get("ours")
    if ours is None:
        return f"| {row['kernel']} | {size} | does not run | - | - |"
    others = ", ".join(
        f"{name} {ms} ({ms / ours:.2f}x)" for name, ms in row["ms"].items() if name != "ours"
    )
    return f"| {row['kernel']} | {size} | {ours} | {share(row, ceilings):.0%} | {others or '-'} |"


def share(row: Mapping[str, Any], ceilings: Mapping[str, float]) -> float:
    """Return what our kernel reaches of the ceiling that binds it; 1 is all.

    >>> share({"bytes": 8e9, "ms": {"ours": 10.0}}, {"copy_gb_per_s": 1000.0})
    0.8
    """
    seconds = row["ms"]["ours"] / 1e3
    if "bytes" in row:
        return float(row["bytes"] / seconds / 1e9 / ceilings["copy_gb_per_s"])
    return float(row["flops"] / seconds / 1e12 / ceilings["bf16_tflop_per_s"])


def load(folder: Path) -> list[dict[str, Any]]:
    """Return the measurements of cards in a folder, oldest first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [result for result in found if "ceilings" in result and "card" in result]


def main() -> int:
    """Write the page."""
    TARGET.write_text(page(load(RESULTS)), encoding="utf-8")
    print(TARGET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
