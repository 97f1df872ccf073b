"""The `tinyllm` command: talk to a model directory, look after the workshop.

Options here are settings of one call, never of a stage: what shapes a result lives in params.yaml.
"""

import atexit
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.exceptions import TyperException

from stages.runner import mistakes_in_one_line
from tinyllm.errors import ParamsError, TinyllmError
from tinyllm.terminal import answer, questions, show

if TYPE_CHECKING:  # torch takes two seconds, `tinyllm --help` should not: imported when used
    from tinyllm.inference.drafts import Draft
    from tinyllm.inference.sampling import SamplingParams
    from tinyllm.inference.session import Session

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="A tiny language model, from raw text to a chatting, exported model.",
)

ModelDir = Annotated[
    Path, typer.Argument(metavar="MODEL_DIR", help="A model directory, e.g. data/models/lora.")
]
Temperature = Annotated[float, typer.Option(help="Flattens the odds above 1; 0: greedy.")]
TopK = Annotated[int, typer.Option(help="Choose among the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Choose among the likeliest tokens up to this sum.")]
MinP = Annotated[float, typer.Option(help="Refuse tokens below this share of the likeliest one.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: avoid tokens said before.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.")]
MaxTokens = Annotated[int, typer.Option(help="Longest text in tokens.")]

HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    for stream in (sys.stdin, sys.stdout):
        with suppress(AttributeError):  # not a text file, as in some tests
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    atexit.register(gc.freeze)  # no last search for cycles among torch's objects: it took 1.3 s
    with mistakes_in_one_line():
        try:
            code = app(standalone_mode=False)
        except TyperException as error:
            message = " ".join(error.format_message().split())
            raise TinyllmError(f"{message.rstrip('.')}; see `tinyllm --help`") from None
        except typer.Abort:
            raise KeyboardInterrupt from None
    raise SystemExit(code if isinstance(code, int) else 0)


@app.command()
def generate(
    model_dir: ModelDir,
    prompt: Annotated[str, typer.Argument(help="Text to continue; '': begin a new one.")],
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    max_tokens: MaxTokens = 200,
    draft: Annotated[
        str | None, typer.Option(help="Guess ahead, same text: lookup, int8 or layers.")
    ] = None,
) -> None:
    """Continue a text; only what is new is printed."""
    sampling = _sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed, max_tokens)
    session = _open(model_dir)
    guesses = None if draft is None else _draft(draft, session, sampling)
    show(session.continue_text(prompt, sampling, guesses))


@app.command()
def chat(
    model_dir: ModelDir,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.9,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    max_tokens: MaxTokens = 200,
) -> None:
    """Talk to a model; questions may also come from a pipe, one per line."""
    sampling = _sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed, max_tokens)
    session = _open(model_dir)
    conversation = session.converse(system)
    if sys.stdin.isatty():
        typer.echo(f"{session.description}; {HELP}", err=True)
        if session.kind == "pretrain":
            typer.echo("this model has not learned to chat: it continues texts", err=True)
    for question in questions():
        if question == "/reset":
            conversation.reset()
        elif question in ("/help", "/?"):
            typer.echo(HELP, err=True)
        elif question == "/quit":
            return
        elif question.startswith("/"):
            typer.echo(f"no such command: {question}; {HELP}", err=True)
        elif question:
            answer(conversation, question, sampling)


@app.command()
def serve(
    model_dir: ModelDir,
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0: every one of this machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 8000,
    system: Annotated[
        str | None, typer.Option(help="System message of chats that bring none; computed once.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Answers made at once.")] = 16,
    queue: Annotated[int, typer.Option(help="Requests that may wait for a slot.")] = 64,
    chunk_tokens: Annotated[int, typer.Option(help="Prompt tokens read between two tokens.")] = 128,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 1024,
    max_seconds: Annotated[float, typer.Option(help="Longest time per call.")] = 300.0,
    max_body_bytes: Annotated[int, typer.Option(help="Largest body of a call.")] = 1_000_000,
    grace_seconds: Annotated[int, typer.Option(help="For running answers at the end.")] = 10,
) -> None:
    """Serve a model over HTTP as OpenAI does, with a chat page; TINYLLM_API_KEY locks it."""
    from tinyllm.serving.calls import Limits
    from tinyllm.serving.server import ServerSettings
    from tinyllm.serving.server import serve as run_server

    try:
        settings = ServerSettings(
            host=host,
            port=port,
            n_slots=slots,
            max_waiting=queue,
            chunk_tokens=chunk_tokens,
            limits=Limits(
                max_body_bytes=max_body_bytes, max_tokens=max_tokens, max_seconds=max_seconds
            ),
            grace_seconds=grace_seconds,
            system=system,
            api_key=os.environ.get("TINYLLM_API_KEY") or None,
        )
    except ValueError as error:
        raise _by_options(error) from None
    run_server(_open(model_dir), settings, lambda line: typer.echo(line, err=True))


@app.command()
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


@app.command()
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


@app.command("import")
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


@app.command()
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


@app.command("prune-hf")
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


@app.command()
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


def _open(directory: Path) -> "Session":
    """Open a model directory of any kind where `TINYLLM_DEVICE` says."""
    from tinyllm.inference.session import open_session
    from tinyllm.quantization.load import load_any_model
    from tinyllm.training.precision import choose_device, use_threads

    use_threads()
    return open_session(directory, load_any_model, choose_device())


def _draft(kind: str, session: "Session", sampling: "SamplingParams") -> "Draft":
    """Return what guesses ahead, or refuse its name."""
    from tinyllm.inference.drafts import LookupDraft, ModelDraft, first_layers
    from tinyllm.quantization.int8 import quantize_model

    model = session.model
    if kind == "lookup":
        return LookupDraft()
    if kind == "int8" and session.kind == "int8":
        raise ParamsError("--draft: the model is in INT8 already; take lookup or layers")
    if kind == "int8":
        return ModelDraft(quantize_model(model), sampling)
    if kind == "layers":
        return ModelDraft(first_layers(model, model.config.n_layers // 2), sampling)
    raise ParamsError(f"--draft: {kind!r} is not one of lookup, int8, layers")


def _sampling(
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int,
    max_tokens: int,
) -> "SamplingParams":
    """Return the sampling parameters, or refuse them by the names of their options."""
    from tinyllm.inference.sampling import SamplingParams

    try:
        return SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            max_new_tokens=max_tokens,
        )
    except ValueError as error:
        raise _by_options(error) from None


def _by_options(error: ValueError) -> ParamsError:
    """Return the mistakes of a settings class under the names of the options."""
    lines = str(error).replace("max_new_tokens", "max_tokens").splitlines()
    named = [line.split(":", 1) for line in lines]
    return ParamsError("\n".join(f"--{name.replace('_', '-')}:{rest}" for name, rest in named))


if __name__ == "__main__":
    main()
