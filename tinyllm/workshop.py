"""The commands that look after the workshop: what it has, takes in, proves and will cost."""

from pathlib import Path
from typing import Annotated

import typer

workshop = typer.Typer()

ModelDir = Annotated[
    Path, typer.Argument(metavar="MODEL_DIR", help="A model directory, e.g. data/models/lora.")
]


@workshop.command()
def doctor(
    verify_cache: Annotated[
        bool, typer.Option("--verify-cache", help="Also re-hash every file of DVC's cache.")
    ] = False,
) -> None:
    """Tell what this machine uses and what a crash has left; repairs nothing itself."""
    from tinyllm.doctor.examine import examine

    n_problems = 0
    section = ""
    for finding in examine(Path(), verify_cache=verify_cache):
        if finding.section != section:
            section = finding.section
            typer.echo(f"\n{section}" if n_problems or section != "machine" else section)
        typer.echo(f"  {'!' if finding.is_problem else ' '} {finding.text}")
        if finding.repair:
            typer.echo(f"      repair: {finding.repair}")
        n_problems += finding.is_problem
    typer.echo(f"\n{n_problems or 'no'} problem{'s' * (n_problems != 1)} found")
    raise typer.Exit(1 if n_problems else 0)


@workshop.command()
def preset(
    name: Annotated[str, typer.Argument(help="A file of presets/, without .yaml.")],
    args: Annotated[
        bool, typer.Option("--args", help="Print it as arguments of `dvc exp run` instead.")
    ] = False,
) -> None:
    """Merge a preset into params.yaml; its comments stay."""
    from tinyllm import paths
    from tinyllm.preset import apply_preset, preset_arguments

    if args:
        typer.echo(" ".join(preset_arguments(name, paths.PRESETS, paths.PARAMS)))
        return
    for line in apply_preset(name, paths.PRESETS, paths.PARAMS):
        typer.echo(line)


@workshop.command("import")
def import_folder(
    folder: Annotated[
        Path, typer.Argument(help="A Hugging Face folder: Llama, Qwen3, dense DeepSeek-V3, GPT-2.")
    ],
    model_dir: ModelDir,
) -> None:
    """Make a model directory from a checkpoint in safetensors; docs/import.md."""
    from tinyllm.export.hf_import import import_hf

    import_hf(folder, model_dir)
    typer.echo(f"{model_dir}: imported")


@workshop.command()
def verify(
    model_dir: ModelDir,
    export_dir: Annotated[
        Path | None, typer.Option(help="Its export, e.g. data/export; else one is made.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A file of held-out text; else data/clean/val.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers.")] = (
        None
    ),
) -> None:
    """Compare every runtime's answers with the model's own; docs/export.md."""
    from rich.console import Console

    from stages.runner import console_progress
    from tinyllm.artifact import write_json
    from tinyllm.export.verify import check_parity
    from tinyllm.parity import export_params, missing_lines, parity_table, verify_model

    bar = export_params().max_logit_diff
    proof = verify_model(model_dir, export_dir, text, console_progress())
    Console().print(parity_table(proof, bar))
    for line in missing_lines(proof):
        typer.echo(line)
    if json_file is not None:
        write_json(json_file, proof.to_metrics(speeds=True))
    check_parity(proof.exact, proof.text, bar)


@workshop.command("prune-hf")
def prune_folder(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder with a byte-level BPE.")],
    corpus: Annotated[Path, typer.Argument(help="Text whose tokens are counted: .txt, .md, ...")],
    out: Annotated[Path, typer.Argument(help="The new Hugging Face folder.")],
    vocab_size: Annotated[
        int, typer.Option(help="Tokens to keep; 0: those that the corpus needs.", min=0)
    ] = 0,
) -> None:
    """Cut a checkpoint's vocabulary to a corpus; docs/pruning.md."""
    from tinyllm.export.prune_hf import prune_hf

    for line in prune_hf(folder, corpus, out, vocab_size or None).lines():
        typer.echo(line)


@workshop.command()
def plan(
    section: Annotated[str, typer.Argument(help="Of params.yaml: pretrain or sft.")] = "pretrain",
    measure: Annotated[
        bool, typer.Option(help="Time ten seconds of steps here for the estimated hours.")
    ] = True,
) -> None:
    """Tell what a training run will cost: parameters, FLOPs, memory, hours."""
    from tinyllm.planning import plan_section

    for line in plan_section(section, measure=measure):
        typer.echo(line)
