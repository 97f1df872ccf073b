"""The `tinyllm` command: talk to a model directory; `workshop.py` has the rest.

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
from tinyllm.workshop import ModelDir, workshop

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

Temperature = Annotated[float, typer.Option(help="Flattens the odds above 1; 0: greedy.")]
TopK = Annotated[int, typer.Option(help="Choose among the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Choose among the likeliest tokens up to this sum.")]
MinP = Annotated[float, typer.Option(help="Refuse tokens below this share of the likeliest one.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: avoid tokens said before.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.")]
MaxTokens = Annotated[int, typer.Option(help="Longest text in tokens.")]
Cache = Annotated[
    str | None,
    typer.Option(help="Keep keys and values in fp32, bf16 or int8; else as suits the model."),
]

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
    cache: Cache = None,
) -> None:
    """Continue a text; only what is new is printed."""
    sampling = _sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed, max_tokens)
    session = _open(model_dir, cache)
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
    cache: Cache = None,
) -> None:
    """Talk to a model; questions may also come from a pipe, one per line."""
    sampling = _sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed, max_tokens)
    session = _open(model_dir, cache)
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
    cache: Cache = None,
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
    run_server(_open(model_dir, cache), settings, lambda line: typer.echo(line, err=True))


app.registered_commands += workshop.registered_commands  # behind ours in `tinyllm --help`


def _open(directory: Path, cache: str | None) -> "Session":
    """Open a model directory of any kind where `TINYLLM_DEVICE` says, with the cache asked for."""
    from tinyllm.inference.generate import CACHES
    from tinyllm.inference.session import open_session
    from tinyllm.quantization.load import load_any_model
    from tinyllm.training.precision import choose_device, use_threads

    if cache is not None and cache not in CACHES:
        raise ParamsError(f"--cache: {cache!r} is not one of {', '.join(CACHES)}")
    use_threads()
    session = open_session(directory, load_any_model, choose_device())
    session.model.cache_dtype = None if cache is None else CACHES[cache]
    return session


def _draft(kind: str, session: "Session", sampling: "SamplingParams") -> "Draft":
    """Return what guesses ahead, or refuse its name."""
    from tinyllm.inference.drafts import LookupDraft, ModelDraft, first_layers
    from tinyllm.quantization.int8 import quantize_model

    model = session.model
    if kind == "lookup":
        return LookupDraft()
    if kind == "int8" and session.is_quantized:
        raise ParamsError("--draft: the model is quantised already; take lookup or layers")
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
