"""A tokenizer.json of Hugging Face with fewer tokens, and how the ids move.

Of the file only the vocabulary, the merges and the ids change: of added tokens, and in the
post-processor. Tokens without a merge (bytes, characters, special tokens) always stay.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tinyllm.errors import DataError
from tinyllm.tokenizer.prune import Merge, leaf_prune


@dataclass(frozen=True)
class PrunedTokenizer:
    """The smaller tokenizer."""

    document: dict[str, Any]
    """The content of its tokenizer.json."""
    kept: list[int]
    """The old id of each new one: the rows that stay."""

    @cached_property
    def new_ids(self) -> dict[int, int]:
        """The new id of each old one that stays."""
        return {old: new for new, old in enumerate(self.kept)}

    def to_json(self) -> str:
        """Return the text of its tokenizer.json."""
        return json.dumps(self.document, ensure_ascii=False, indent=2) + "\n"

    def moved(self, value: Any) -> Any:
        """Return an id, or the ids in a list, as they are now; None stays."""
        if isinstance(value, list):
            return [self.moved(one) for one in value]
        return self.new_ids[value] if type(value) is int and value in self.new_ids else value


def prune_document(
    document: Mapping[str, Any], counts: Mapping[int, int], vocab_size: int | None
) -> PrunedTokenizer:
    """Return the tokenizer with the tokens that text needs.

    Args:
        document: the content of a tokenizer.json.
        counts: how often each id stands in the text.
        vocab_size: tokens to keep at most; None: all with a count, and those they are built from.

    Raises:
        DataError: it is no BPE, or the tokens without a merge are more than `vocab_size`.
    """
    model = document["model"]
    if model.get("type") != "BPE":
        raise DataError(f"tokenizer.json: a {model.get('type')} model; only BPE can be pruned")
    ids: dict[str, int] = model["vocab"]
    merges = [_merge(merge) for merge in model["merges"]]
    added = {token["content"]: token["id"] for token in document.get("added_tokens", [])}
    outside = len(set(added) - set(ids))
    if vocab_size is None:
        tokens = _needed(ids, merges, counts)
    else:
        tokens = leaf_prune(ids, merges, counts, vocab_size - outside)
        if len(tokens) + outside > vocab_size:
            raise DataError(
                f"vocab_size: {vocab_size} is too small, {len(tokens) + outside} tokens are made by"
                " no merge (bytes, characters, special ones) and stay"
            )
    tokens |= set(added) & set(ids)
    kept = sorted({ids[token] for token in tokens} | set(added.values()))
    pruned = PrunedTokenizer(copy.deepcopy(dict(document)), kept)
    content = pruned.document["model"]
    content["vocab"] = {t: pruned.new_ids[ids[t]] for t in sorted(tokens, key=ids.__getitem__)}
    content["merges"] = [
        original
        for original, (left, right) in zip(model["merges"], merges, strict=True)
        if left + right in tokens and left in tokens and right in tokens
    ]
    for token in pruned.document.get("added_tokens", []):
        token["id"] = pruned.new_ids[token["id"]]
    _move_ids(pruned.document.get("post_processor"), pruned)
    return pruned


def _merge(merge: Any) -> Merge:
    """Return a merge from either way to write it: "a b", or ["a", "b"]."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _needed(ids: Mapping[str, int], merges: list[Merge], counts: Mapping[int, int]) -> set[str]:
    """Return the tokens with a count, all they are built from, and all that no merge makes."""
    parts: dict[str, list[Merge]] = {}
    for left, right in merges:
        parts.setdefault(left + right, []).append((left, right))
    todo = [token for token, i in ids.items() if counts.get(i) or token not in parts]
    needed = set(todo)
    while todo:
        for pair in parts.get(todo.pop(), []):
            todo += [part for part in set(pair) if part not in needed]
            needed.update(pair)
    return needed


def _move_ids(part: Any, pruned: PrunedTokenizer) -> None:
    """Renumber the special tokens of a post-processor, in place."""
    if isinstance(part, list):
        for inner in part:
            _move_ids(inner, pruned)
    elif isinstance(part, dict):
        for name, value in part.items():
            if name == "ids":
                part[name] = pruned.moved(value)
            elif name in ("sep", "cls") and isinstance(value, list):
                part[name] = [value[0], pruned.moved(value[1])]
            else:
                _move_ids(value, pruned)
