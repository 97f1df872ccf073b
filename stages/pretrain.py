"""pretrain: data/tokens, data/tokenizer/pruned -> data/models/pretrain."""

from dataclasses import asdict, dataclass

from stages.identity import identity
from stages.runner import console_progress, run_stage
from tinyllm import paths
from tinyllm.artifact import build_artifact, load_manifest
from tinyllm.evaluation.probe import Probe, evaluate_split, sample_text
from tinyllm.model.directory import COPIED, save_model
from tinyllm.model.init import build_model
from tinyllm.model.sizes import ModelParams, resolve
from tinyllm.params import load_params
from tinyllm.shards.batches import StreamBatches
from tinyllm.shards.reader import TokenShards
from tinyllm.tokenizer.tokenizer import Tokenizer
from tinyllm.training.loop import train
from tinyllm.training.outcome import write_outcome
from tinyllm.training.params import TrainingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """The sections this stage reads."""

    seed: int
    model: ModelParams
    pretrain: TrainingParams


def pretrain() -> None:
    """Train a new model on the token shards; a run that was stopped goes on where it was."""
    params, inputs = load_params(Params, paths.PARAMS), [paths.TOKENS, paths.TOKENIZER]
    knobs, run = params.pretrain, identity("pretrain", params, inputs)
    tokenizer, digest = Tokenizer.load(paths.TOKENIZER), load_manifest(paths.TOKENIZER).digest
    text, val = (TokenShards.open(paths.TOKENS, split, digest) for split in ("train", "val"))
    text.check_ends(tokenizer.id_of("<|endoftext|>"), wanted=knobs.preflight)
    probe = Probe(val, tokenizer, knobs.seq_len)
    model = build_model(resolve(params.model, tokenizer.vocab_size), params.seed)
    result = train(
        model,
        knobs,
        StreamBatches(text.stream, knobs.seq_len, knobs.batch_size, params.seed),
        evaluate=lambda model: probe.evaluate(model, knobs.precision),
        sample=lambda model: sample_text(model, tokenizer),
        stage="pretrain",
        identity=run,
        seed=params.seed,
        progress=console_progress(),
        fresh=True,
    )
    final = asdict(evaluate_split(model, val, knobs.seq_len, knobs.precision))
    settings = {"config": run["params"], "copies": {n: paths.TOKENIZER / n for n in COPIED}}
    with build_artifact(paths.PRETRAIN, kind="pretrain", made_from=inputs, **settings) as draft:
        save_model(model, draft.path)
    write_outcome(paths.REPORTS, "pretrain", result, final)


if __name__ == "__main__":
    run_stage(pretrain, on_ranks=True)
