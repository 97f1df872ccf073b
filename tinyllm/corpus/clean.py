"""Raw documents to clean ones: repair, filter, remove duplicates, hold out a validation set.

Two passes over the text with memory for signatures only: the first decides about each document by
itself and about exact copies, the second about near-duplicates and leaks, when the validation set
is known.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from tinyllm.corpus.clean_params import CleanParams
from tinyllm.corpus.dedup import HeldOut, near_duplicates, stack_signatures
from tinyllm.corpus.documents import Document, read_documents, write_documents
from tinyllm.corpus.filters import QUALITY, REPETITION, judge, view
from tinyllm.corpus.language import LanguageFilter
from tinyllm.corpus.normalize import normalize
from tinyllm.corpus.runs import WordHasher
from tinyllm.corpus.shingles import shingle, signature
from tinyllm.errors import DataError
from tinyllm.progress import Progress


@dataclass(slots=True)
class Tally:
    """What happened to the documents, for the report."""

    reasons: Counter[str] = field(default_factory=Counter)
    """Dropped documents by reason."""
    edits: Counter[str] = field(default_factory=Counter)
    """Repairs inside kept and dropped documents."""
    documents: Counter[str] = field(default_factory=Counter)
    """Documents in, and per split."""
    bytes: Counter[str] = field(default_factory=Counter)
    """UTF-8 bytes in, and per split."""

    def count(self, where: str, text: str) -> None:
        """Count a document and its bytes."""
        self.documents[where] += 1
        self.bytes[where] += len(text.encode())

    def metrics(self) -> dict[str, Any]:
        """Return the report: numbers by name."""
        dropped = sum(self.reasons.values())
        return {
            "documents": self.documents["raw"],
            "bytes": self.bytes["raw"],
            "documents_dropped": dropped,
            "exact_duplicates": self.reasons["exact_duplicate"],
            "near_duplicates": self.reasons["near_duplicate"],
            "leaks_removed": self.reasons["leak"],
            **{
                f"{name}_{split}": counts[split]
                for split in ("train", "val")
                for name, counts in (("documents", self.documents), ("bytes", self.bytes))
            },
            **{name: self.edits[name] for name in _EDITS},
            "reasons": {name: count for name, count in sorted(self.reasons.items()) if count},
        }


_EDITS = ("encodings_repaired", "lines_dropped", "contacts_scrubbed")


def clean_corpus(
    raw: Sequence[Path], target: Path, params: CleanParams, n_documents: int, progress: Progress
) -> dict[str, Any]:
    """Write `train/` and `val/` into `target` and return the metrics.

    Args:
        raw: folders of documents, one per source, in order.
        target: gets `train` and `val`; used for intermediate files too.
        params: thresholds and the split.
        n_documents: in `raw`, for the progress.
        progress: told the documents done.

    Raises:
        DataError: no document is left for training, or none for validation.
    """
    tally, work = Tally(), target / "work"
    documents = (document for directory in raw for document in read_documents(directory))
    held_out: list[Document] = []
    kept = _first_pass(_reported(documents, n_documents, progress), params, tally, held_out)
    n_train = write_documents(work, kept)
    _refuse_empty(n_train, len(held_out), params, tally)
    hasher = WordHasher()
    val_sets = [shingle(document.text, hasher) for document in held_out]
    doubles = near_duplicates(
        stack_signatures([signature(each) for each in val_sets]), params.near_duplicate_threshold
    )
    tally.reasons["near_duplicate"] += int(doubles.sum())
    val = [document for document, double in zip(held_out, doubles, strict=True) if not double]
    write_documents(target / "val", _counted(val, "val", tally))
    train = _without_copies(work, HeldOut(val_sets), hasher, params, tally)
    n_train = write_documents(target / "train", _counted(train, "train", tally))
    shutil.rmtree(work)
    _refuse_empty(n_train, len(val), params, tally)
    return tally.metrics()


def is_held_out(name: str, digest: int, params: CleanParams) -> bool:
    """Return whether a document belongs to validation; depends on nothing but the document itself.

    Args:
        name: of the document.
        digest: xxh3_128 of its clean text.
        params: the name list and the share.
    """
    if any(part in name for part in params.val_documents):
        return True
    return digest < params.val_share * 2**128


def _first_pass(
    documents: Iterable[Document], params: CleanParams, tally: Tally, held_out: list[Document]
) -> Iterator[Document]:
    """Yield clean training documents, put the validation ones into `held_out`."""
    in_language = LanguageFilter(params.languages, params.language_threshold)
    hasher = WordHasher()
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    for document in documents:
        tally.count("raw", document.text)
        result = normalize(document.text, params.drop_lines, params.scrub_contacts)
        tally.edits["encodings_repaired"] += result.encoding_repaired
        tally.edits["lines_dropped"] += result.lines_dropped
        tally.edits["contacts_scrubbed"] += result.contacts_scrubbed
        looked = view(result.text, hasher)
        reason = (
            judge(looked, params, QUALITY)
            or in_language(result.text)
            or judge(looked, params, REPETITION)
        )
        digest = xxhash.xxh3_128_intdigest(result.text.encode())
        val = is_held_out(document.name, digest, params)
        if reason is None and digest in seen[val]:
            reason = "exact_duplicate"
        if reason is not None:
            tally.reasons[reason] += 1
            continue
        seen[val].add(digest)
        if val:
            held_out.append(Document(document.name, result.text))
        else:
            yield Document(document.name, result.text)


def _without_copies(
    work: Path, held_out: HeldOut, hasher: WordHasher, params: CleanParams, tally: Tally
) -> Iterator[Document]:
    """Yield the documents in `work` that copy neither a held-out one nor an earlier one."""
    signatures, leaks = [], set()
    for number, document in enumerate(read_documents(work)):
        shingles = shingle(document.text, hasher)
        if held_out.overlap(shingles) >= params.near_duplicate_threshold:
            leaks.add(number)
        else:
            signatures.append(signature(shingles))
    doubles = iter(near_duplicates(stack_signatures(signatures), params.near_duplicate_threshold))
    for number, document in enumerate(read_documents(work)):
        if number in leaks:
            tally.reasons["leak"] += 1
        elif next(doubles):
            tally.reasons["near_duplicate"] += 1
        else:
            yield document


def _counted(documents: Iterable[Document], split: str, tally: Tally) -> Iterator[Document]:
    """Pass documents on, counting them."""
    for document in documents:
        tally.count(split, document.text)
        yield document


def _reported(
    documents: Iterable[Document], n_documents: int, progress: Progress
) -> Iterator[Document]:
    """Pass documents on, telling how many."""
    for number, document in enumerate(documents, start=1):
        yield document
        progress.step("clean", number, max(n_documents, number))


def _refuse_empty(n_train: int, n_val: int, params: CleanParams, tally: Tally) -> None:
    """Refuse a corpus of which nothing is left."""
    reasons = ", ".join(f"{name} {count}" for name, count in tally.reasons.most_common(3))
    dropped = f"; dropped: {reasons}" if reasons else ""
    n_raw = tally.documents["raw"]
    if not n_val:
        raise DataError(
            f"data/clean: the validation set is empty: of {n_raw} documents none that is kept has"
            f" one of clean.val_documents ({', '.join(params.val_documents)}) in its name, and"
            f" clean.val_share is {params.val_share}; set val_share, 0.05 for example{dropped}"
        )
    if not n_train:
        raise DataError(
            f"data/clean: no training document is left of {n_raw}; loosen the filters of `clean`"
            f" or hold out less{dropped}"
        )
