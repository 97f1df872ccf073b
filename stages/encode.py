"""encode: data/clean, data/tokenizer/pruned -> data/tokens/{train,val}."""

import time
from dataclasses import dataclass
from typing import Any

from stages.runner import console_progress, run_stage
from tinyllm import paths
from tinyllm.artifact import build_artifact, load_manifest, verify_files
from tinyllm.corpus.documents import read_documents
from tinyllm.params import load_params
from tinyllm.report import write_metrics
from tinyllm.shards.writer import EncodeParams, write_tokens
from tinyllm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """The sections this stage reads."""

    encode: EncodeParams


def encode() -> None:
    """Turn the documents into token shards."""
    params, progress = load_params(Params, paths.PARAMS).encode, console_progress()
    manifest = load_manifest(paths.TOKENIZER, "tokenizer")
    verify_files(paths.TOKENIZER, manifest)
    verify_files(paths.CLEAN, load_manifest(paths.CLEAN, "clean"))
    tokenizer, started_s = Tokenizer.load(paths.TOKENIZER), time.perf_counter()
    with build_artifact(
        paths.TOKENS, kind="tokens", made_from=[paths.CLEAN, paths.TOKENIZER], config=params
    ) as draft:
        documents = {split: read_documents(paths.CLEAN / split) for split in ("train", "val")}
        draft.info.update(
            write_tokens(documents, draft.path, tokenizer, manifest.digest, params, progress)
        )
    seconds = time.perf_counter() - started_s
    splits = draft.info["splits"]
    metrics: dict[str, Any] = {split: _figures(entry) for split, entry in splits.items()}
    metrics["tokens_per_s"] = sum(entry["n_tokens"] for entry in splits.values()) / seconds
    write_metrics(paths.REPORTS, "encode", metrics)


def _figures(entry: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of one split from its manifest entry."""
    return {
        "documents": entry["n_documents"],
        "shards": len(entry["shards"]),
        "tokens": entry["n_tokens"],
        "bytes_per_token": entry["n_bytes"] / entry["n_tokens"],
    }


if __name__ == "__main__":
    run_stage(encode)
