"""The last chapters: where every artifact comes from, and with which settings."""

from collections.abc import Mapping

from stages.page.blocks import Block, Cell, Figure, Figures, Folded, Section, Table
from stages.page.facts import Facts
from stages.page.numbers import flatten
from tinyllm.artifact import Manifest

SHORT = 12
"""Digits of a digest that are shown."""


def lineage(facts: Facts) -> Section:
    """Name the digest of every artifact, and what does not fit together."""
    current = {manifest.kind: manifest.digest for manifest in facts.manifests.values()}
    rows = []
    for path, manifest in facts.manifests.items():
        state, mark = _state(manifest, current)
        rows.append(
            [
                Cell(manifest.kind, title=str(path), is_number=False),
                Cell(manifest.digest[:SHORT], title=f"{path}: {manifest.digest}", is_number=False),
                Cell(str(len(manifest.files))),
                Cell(state, mark=mark, is_number=False),
            ]
        )
    blocks: list[Block] = []
    if rows:
        blocks.append(Table(("artifact", "SHA-256", "files", "made from"), rows))
    if facts.versions:
        blocks.append(Figures([Figure(name, text) for name, text in facts.versions.items()]))
    return Section(
        "lineage",
        "Lineage",
        "Every artifact names the digests of everything it was made from. Artifacts of different"
        " ancestry are never mixed.",
        blocks,
    )


def settings(facts: Facts) -> Section:
    """Show the resolved parameters of every artifact."""
    blocks = []
    for manifest in facts.manifests.values():
        rows = [
            [Cell(name, is_number=False), Cell("null" if value is None else str(value))]
            for name, value in flatten(manifest.config)
        ]
        if rows:
            blocks.append(Folded(manifest.kind, Table(("parameter", "value"), rows)))
    return Section(
        "settings",
        "Settings",
        "The parameters each artifact was made with, as its manifest has them.",
        blocks,
    )


def _state(manifest: Manifest, current: Mapping[str, str]) -> tuple[str, str]:
    """Return in words whether an artifact fits the others, and a mark."""
    if not manifest.lineage:
        return "the source", ""
    foreign = [
        kind for kind, digest in manifest.lineage.items() if current.get(kind, digest) != digest
    ]
    if foreign:
        return f"an older {', '.join(foreign)}", "bad"
    return f"ancestors: {len(manifest.lineage)}, all current", "good"
