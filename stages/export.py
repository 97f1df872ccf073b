"""export: data/models/lora/merged -> data/export/{hf,onnx,gguf}, proven on data/clean/val."""

import os
from dataclasses import dataclass
from itertools import islice

from stages.runner import console_progress, run_stage
from tinyllm import paths
from tinyllm.artifact import build_artifact, load_manifest, verify_files
from tinyllm.corpus.documents import read_documents
from tinyllm.export.bundle import GGUF, HF, ONNX_FLOAT, ONNX_INT8, prove_bundle, write_bundle
from tinyllm.export.params import ExportParams
from tinyllm.export.verify import check_parity
from tinyllm.model.directory import WEIGHTS
from tinyllm.params import load_params
from tinyllm.report import write_metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """The sections this stage reads."""

    export: ExportParams


def export() -> None:
    """Write the model for transformers and ONNX Runtime and prove that both give its answers."""
    params = load_params(Params, paths.PARAMS).export
    progress = console_progress()
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it looks up nothing
    verify_files(paths.CLEAN, load_manifest(paths.CLEAN, "clean"))
    documents = islice(read_documents(paths.CLEAN / "val"), params.prompts)
    texts = [document.text for document in documents]
    sources = [paths.LORA_MERGED, paths.CLEAN]
    with build_artifact(paths.EXPORT, kind="export", made_from=sources, config=params) as draft:
        write_bundle(paths.LORA_MERGED, draft.path, params, progress)
        proof = prove_bundle(paths.LORA_MERGED, draft.path, texts, params, progress)
        check_parity(proof.exact, proof.text, params.max_logit_diff)
    files = {"hf": f"{HF}/{WEIGHTS}", "onnx": ONNX_FLOAT, "onnx_int8": ONNX_INT8}
    files |= {f"gguf_{kind}": file for kind, file in GGUF.items()}
    sizes = {
        f"{name}_bytes": (paths.EXPORT / file).stat().st_size
        for name, file in files.items()
        if (paths.EXPORT / file).is_file()
    }
    write_metrics(paths.REPORTS, "export", {**proof.to_metrics(), **sizes})


if __name__ == "__main__":
    run_stage(export)
