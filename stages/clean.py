"""clean: data/raw -> data/clean/{train,val}."""

from dataclasses import dataclass

from stages.runner import console_progress, run_stage
from tinyllm import paths
from tinyllm.artifact import build_artifact, load_manifest, verify_files
from tinyllm.corpus.clean import clean_corpus
from tinyllm.corpus.clean_params import CleanParams
from tinyllm.params import load_params
from tinyllm.report import write_metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """The sections this stage reads."""

    clean: CleanParams


def clean() -> None:
    """Filter, deduplicate and split the raw documents."""
    params = load_params(Params, paths.PARAMS).clean
    progress = console_progress()
    manifest = load_manifest(paths.RAW, "raw")
    verify_files(paths.RAW, manifest)
    sources = manifest.info["sources"]
    raw = [paths.RAW / name for name in sorted(sources)]
    n_documents = sum(source["documents"] for source in sources.values())
    with build_artifact(paths.CLEAN, kind="clean", made_from=[paths.RAW], config=params) as draft:
        metrics = clean_corpus(raw, draft.path, params, n_documents, progress)
        draft.info.update(metrics)
    progress.say(
        f"kept {metrics['documents_train']:,} documents for training and"
        f" {metrics['documents_val']:,} for validation, dropped {metrics['documents_dropped']:,}"
    )
    write_metrics(paths.REPORTS, "clean", metrics)


if __name__ == "__main__":
    run_stage(clean)
