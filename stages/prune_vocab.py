"""prune_vocab: data/clean, data/tokenizer/full -> data/tokenizer/pruned."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from stages.runner import console_progress, run_stage
from tinyllm import paths
from tinyllm.artifact import build_artifact, load_manifest, verify_files, write_text
from tinyllm.corpus.documents import read_documents
from tinyllm.params import load_params
from tinyllm.report import write_metrics
from tinyllm.tokenizer.chat import CHAT_TEMPLATE, CHAT_TEMPLATE_FILE
from tinyllm.tokenizer.prune import PruneParams, check, count_tokens, prune, require_clean
from tinyllm.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer
from tinyllm.tokenizer.train import bytes_per_token, sample_texts


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """The sections this stage reads."""

    prune: PruneParams


def prune_vocab() -> None:
    """Take the least used tokens out of the vocabulary and prove that nothing else changed."""
    params, progress = load_params(Params, paths.PARAMS).prune, console_progress()
    for folder, kind in ((paths.CLEAN, "clean"), (paths.TOKENIZER_FULL, "tokenizer_full")):
        verify_files(folder, load_manifest(folder, kind))
    document = (paths.TOKENIZER_FULL / TOKENIZER_FILE).read_text(encoding="utf-8")
    full, made_from = Tokenizer.load(paths.TOKENIZER_FULL), [paths.CLEAN, paths.TOKENIZER_FULL]
    with build_artifact(
        paths.TOKENIZER, kind="tokenizer", made_from=made_from, config=params
    ) as draft:
        if params.vocab_size is not None:
            train = sample_texts(lambda: _texts("train"), params.sample_bytes)
            document = prune(document, count_tokens(full, train), params.vocab_size)
        pruned = Tokenizer(document)
        report = require_clean(check(full, pruned, _texts("val")))
        metrics = {
            "vocab_size_before": full.vocab_size,
            "vocab_size": pruned.vocab_size,
            "embedding_rows_removed": full.vocab_size - pruned.vocab_size,
            "bytes_per_token_before": bytes_per_token(full, _texts("val")),
            "bytes_per_token": bytes_per_token(pruned, _texts("val")),
        } | asdict(report)
        for name, text in ((TOKENIZER_FILE, document), (CHAT_TEMPLATE_FILE, CHAT_TEMPLATE)):
            write_text(draft.path / name, text)
        draft.info.update(metrics)
    progress.say(f"{full.vocab_size} -> {pruned.vocab_size} tokens, 0 unreachable")
    write_metrics(paths.REPORTS, "prune_vocab", metrics)


def _texts(split: str) -> Iterator[str]:
    """Yield the texts of a split."""
    return (document.text for document in read_documents(paths.CLEAN / split))


if __name__ == "__main__":
    run_stage(prune_vocab)
