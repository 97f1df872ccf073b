"""sft: data/chat, data/models/pretrain -> data/models/sft."""

from dataclasses import dataclass

from stages.identity import identity
from stages.runner import console_progress, run_stage
from tinyllm import paths
from tinyllm.artifact import build_artifact, merge_lineage
from tinyllm.finetune.chat_task import ChatTask
from tinyllm.model.directory import COPIED, load_model, save_model
from tinyllm.params import load_params
from tinyllm.training.loop import train
from tinyllm.training.outcome import write_outcome
from tinyllm.training.params import TrainingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """The sections this stage reads."""

    seed: int
    sft: TrainingParams


def sft() -> None:
    """Teach the pretrained model to answer; a run that was stopped goes on where it was."""
    params = load_params(Params, paths.PARAMS)
    inputs = [paths.CHAT, paths.PRETRAIN]
    merge_lineage(inputs)  # refuses dialogues made for another tokenizer before any work is done
    run = identity("sft", params, inputs)
    model = load_model(paths.PRETRAIN)
    task = ChatTask(paths.CHAT, "sft", paths.PRETRAIN, params.sft)
    result = train(
        model,
        params.sft,
        task.batches(params.seed),
        evaluate=task.evaluate,
        sample=task.sample,
        stage="sft",
        identity=run,
        seed=params.seed,
        progress=console_progress(),
    )
    figures = task.figures(model, result)
    copies = {name: paths.PRETRAIN / name for name in COPIED}
    settings = {"config": run["params"], "copies": copies}
    with build_artifact(paths.SFT, kind="sft", made_from=inputs, **settings) as draft:
        save_model(model, draft.path)
    write_outcome(paths.REPORTS, "sft", result, figures)


if __name__ == "__main__":
    run_stage(sft, on_ranks=True)
