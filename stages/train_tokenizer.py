"""train_tokenizer: data/clean -> data/tokenizer/full."""

from collections.abc import Iterator
from dataclasses import dataclass

from stages.runner import console_progress, run_stage
from tinyllm import paths
from tinyllm.artifact import build_artifact, load_manifest, verify_files, write_text
from tinyllm.corpus.documents import read_documents
from tinyllm.params import load_params
from tinyllm.report import write_metrics
from tinyllm.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer
from tinyllm.tokenizer.train import (
    TokenizerParams,
    bytes_per_token,
    sample_texts,
    train_bpe,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """The sections this stage reads."""

    tokenizer: TokenizerParams


def train_tokenizer() -> None:
    """Learn a byte-level BPE vocabulary from the training documents."""
    params, progress = load_params(Params, paths.PARAMS).tokenizer, console_progress()
    verify_files(paths.CLEAN, load_manifest(paths.CLEAN, "clean"))
    with build_artifact(
        paths.TOKENIZER_FULL, kind="tokenizer_full", made_from=[paths.CLEAN], config=params
    ) as draft:
        document = train_bpe(sample_texts(_train_texts, params.sample_bytes), params)
        tokenizer = Tokenizer(document)
        metrics = {
            "vocab_size": tokenizer.vocab_size,
            "bytes_per_token": bytes_per_token(
                tokenizer, (document.text for document in read_documents(paths.CLEAN / "val"))
            ),
        }
        write_text(draft.path / TOKENIZER_FILE, document)
        draft.info.update(metrics)
    progress.say(
        f"{tokenizer.vocab_size} tokens, {metrics['bytes_per_token']:.3f} bytes of val per token"
    )
    write_metrics(paths.REPORTS, "train_tokenizer", metrics)


def _train_texts() -> Iterator[str]:
    """Yield the training texts."""
    return (document.text for document in read_documents(paths.CLEAN / "train"))


if __name__ == "__main__":
    run_stage(train_tokenizer)
