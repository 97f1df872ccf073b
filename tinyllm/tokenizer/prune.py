"""A smaller vocabulary with the same merges: take away the tokens that are used least.

Only a leaf may go: a token that no other merge needs. Its count then flows to its two parts,
because they will stand where it stood, and they may become leaves in turn. What stays is closed
under ancestors: with each token all tokens it is built from. Bytes and special tokens have no merge
and always stay.

Why nothing else changes: tokens only grow while a word is encoded. If all final tokens of a word
stay, everything they are built from stays, so no removed merge took part, and the word is encoded
as before. The common script (keep the N most frequent, drop merges that lost a part) has no such
guarantee: of 16,000 kept tokens 1,407 could never be produced again.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any

from tinyllm.errors import GateError
from tinyllm.tokenizer.alphabet import N_RESERVED
from tinyllm.tokenizer.special import SPECIAL_TOKENS
from tinyllm.tokenizer.tokenizer import Tokenizer

Merge = tuple[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneParams:
    """The `prune` section."""

    vocab_size: int | None
    """Tokens to keep at most, with the 256 bytes and the special ones; null: keep all."""
    sample_bytes: int
    """Count tokens in at most this many bytes of text, spread over the documents by a hash."""

    def __post_init__(self) -> None:
        problems = []
        if self.vocab_size is not None and self.vocab_size < N_RESERVED:
            problems.append(
                f"vocab_size: {self.vocab_size} has no room for {N_RESERVED - len(SPECIAL_TOKENS)}"
                f" bytes and {len(SPECIAL_TOKENS)} special tokens; give {N_RESERVED} or more, or"
                " null to keep all"
            )
        if self.sample_bytes < 1:
            problems.append(f"sample_bytes: {self.sample_bytes} is below 1; 100000000 is plenty")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What was checked after pruning; all zeros, or the vocabulary must not be used."""

    unreachable_tokens: int
    """Kept tokens whose own bytes do not encode to exactly them."""
    changed_words: int
    """Different words whose tokens were all kept and that are encoded differently now."""
    round_trip_failures: int
    """Texts that do not come back from their ids."""


def count_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[int]:
    """Return how often each id stands in the texts."""
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(tokenizer.encode_batch([text])[0])
    return counts


def prune(document: str, counts: Mapping[int, int], vocab_size: int) -> str:
    """Return a tokenizer.json with at most `vocab_size` tokens.

    Args:
        document: the content of a tokenizer.json.
        counts: how often each id is used in typical text.
        vocab_size: at least the bytes and special tokens. New ids follow the order of the old ones.
    """
    content: dict[str, Any] = json.loads(document)
    model = content["model"]
    old_ids: dict[str, int] = model["vocab"]
    merges = [(left, right) for left, right in model["merges"]]
    kept = leaf_prune(old_ids, merges, counts, vocab_size)
    model["vocab"] = {token: i for i, token in enumerate(sorted(kept, key=old_ids.__getitem__))}
    model["merges"] = [[left, right] for left, right in merges if left + right in kept]
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def leaf_prune(
    ids: Mapping[str, int], merges: Iterable[Merge], counts: Mapping[int, int], vocab_size: int
) -> set[str]:
    """Return the tokens that stay.

    Args:
        ids: id of each token; of equally rare tokens the one learned last goes first.
        merges: (left, right) of each merge; two merges may spell the same token.
        counts: how often each id is used.
        vocab_size: how many tokens stay, unless the tokens without a merge are more.
    """
    merges_of: dict[str, list[Merge]] = {}
    for left, right in merges:
        merges_of.setdefault(left + right, []).append((left, right))
    uses = Counter(part for pairs in merges_of.values() for pair in pairs for part in pair)
    count = {token: counts.get(i, 0) for token, i in ids.items()}
    kept = set(ids)
    leaves = [(count[token], -ids[token], token) for token in merges_of if not uses[token]]
    heapify(leaves)
    while len(kept) > vocab_size and leaves:
        n, _, token = heappop(leaves)
        kept.remove(token)
        for part in merges_of[token][0]:  # text falls apart as the first merge put it together
            count[part] += n
        for part in (part for pair in merges_of[token] for part in pair):
            uses[part] -= 1
            if part in merges_of and not uses[part]:
                heappush(leaves, (count[part], -ids[part], part))
    return kept


def check(full: Tokenizer, pruned: Tokenizer, texts: Iterable[str]) -> PruneReport:
    """Compare a pruned tokenizer with the one it came from, using the encoder itself.

    Args:
        full: before.
        pruned: after.
        texts: text that pruning did not see.
    """
    model, vocabulary = pruned.backend.model, pruned.backend.get_vocab(with_added_tokens=True)
    unreachable = sum(
        [piece.id for piece in model.tokenize(token)] != [i]
        for token, i in vocabulary.items()
        if token not in SPECIAL_TOKENS
    )
    words: set[str] = set()
    failures = 0
    for text in texts:
        words.update(word for word, _ in full.backend.pre_tokenizer.pre_tokenize_str(text))
        failures += pruned.decode(pruned.encode_batch([text])[0]) != text
    changed = 0
    for word in words:
        before = [piece.value for piece in full.backend.model.tokenize(word)]
        if all(token in vocabulary for token in before):
            changed += before != [piece.value for piece in model.tokenize(word)]
    return PruneReport(unreachable, changed, failures)


def require_clean(report: PruneReport) -> PruneReport:
    """Return the report, or refuse a vocabulary that failed a check.

    Raises:
        GateError: some count is not zero.
    """
    if report != PruneReport(0, 0, 0):
        raise GateError(
            f"prune: {report.unreachable_tokens} unreachable tokens, {report.changed_words} changed"
            f" words, {report.round_trip_failures} failed round trips; set prune.vocab_size: null"
        )
    return report
