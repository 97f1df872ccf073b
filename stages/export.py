"""export: data/models/lora/merged -> data/export/{hf,onnx,gguf}, proven on data/clean/val."""

import os
from dataclasses import dataclass

from rich.console import Console

from stages.runner import console_progress, run_stage
from tinyllm import paths
from tinyllm.artifact import build_artifact
from tinyllm.export.bundle import Adapter, write_bundle
from tinyllm.export.params import ExportParams
from tinyllm.export.proof import prove_bundle
from tinyllm.export.verify import check_parity
from tinyllm.params import load_params
from tinyllm.parity import held_out_texts, missing_lines, parity_table
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
    texts = held_out_texts()
    sources = [paths.LORA_MERGED, paths.LORA_ADAPTER, paths.SFT, paths.INT8, paths.CLEAN]
    adapter = Adapter(paths.SFT, paths.LORA_ADAPTER)
    with build_artifact(paths.EXPORT, kind="export", made_from=sources, config=params) as draft:
        skipped = write_bundle(paths.LORA_MERGED, draft.path, params, progress, adapter)
        proof = prove_bundle(
            paths.LORA_MERGED, draft.path, texts, params, progress, skipped, [paths.INT8]
        )
        draft.info["skipped"] = skipped
        Console(stderr=True).print(parity_table(proof, params.max_logit_diff))
        for line in missing_lines(proof):
            progress.say(line)
        check_parity(proof.exact, proof.text, params.max_logit_diff)
    write_metrics(paths.REPORTS, "export", proof.to_metrics())


if __name__ == "__main__":
    run_stage(export)
