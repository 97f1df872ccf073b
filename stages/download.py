"""download: the sources in params.yaml -> data/raw/<source>/documents-*.jsonl."""

import shutil
from dataclasses import dataclass

from stages.runner import console_progress, run_stage
from tinyllm import paths
from tinyllm.artifact import build_artifact, digest_json
from tinyllm.corpus.fetch import fetch
from tinyllm.corpus.raw import write_raw
from tinyllm.corpus.sources import DataParams
from tinyllm.params import load_params, to_plain
from tinyllm.report import write_metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """The sections this stage reads."""

    data: DataParams


def download() -> None:
    """Fetch every source, check its hash and write its texts as documents."""
    data = load_params(Params, paths.PARAMS).data
    progress, metrics, folders = console_progress(), {}, []
    with build_artifact(paths.RAW, kind="raw", made_from=[], config=data) as draft:
        for name, source in sorted(data.sources.items()):
            # outside the output and named by the source: a broken download goes on next time
            key = digest_json(to_plain(source))[:16]
            folders.append(paths.inflight_root() / "download" / key)
            files = fetch(source, folders[-1], progress)
            counts = write_raw(draft.path / name, name, source, files, data.max_documents)
            progress.say(f"{name}: {counts['documents']:,} documents, {counts['bytes']:,} bytes")
            metrics[name] = counts
        draft.info["sources"] = metrics
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    write_metrics(paths.REPORTS, "download", metrics)


if __name__ == "__main__":
    run_stage(download)
