"""lora: data/chat, data/models/sft -> data/models/lora/{adapter,merged}."""

from dataclasses import dataclass

from stages.identity import identity
from stages.runner import console_progress, run_stage
from tinyllm import paths
from tinyllm.artifact import build_artifact, merge_lineage
from tinyllm.finetune.adapter import save_adapter
from tinyllm.finetune.chat_task import ChatTask
from tinyllm.finetune.lora import LoraParams, add_lora, merge_lora, trainable_share
from tinyllm.model.directory import COPIED, load_model, save_model
from tinyllm.params import load_params
from tinyllm.training.loop import train
from tinyllm.training.outcome import write_outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """The sections this stage reads."""

    seed: int
    lora: LoraParams


def lora() -> None:
    """Teach the chat model further topics with an adapter; keep the adapter and the sum of both."""
    params = load_params(Params, paths.PARAMS)
    inputs = [paths.CHAT, paths.SFT]
    merge_lineage(inputs)  # refuses dialogues made for another tokenizer before any work is done
    run = identity("lora", params, inputs)
    model = add_lora(load_model(paths.SFT), params.lora, params.seed)
    task = ChatTask(paths.CHAT, "lora", paths.SFT, params.lora)
    result = train(
        model,
        params.lora,
        task.batches(params.seed),
        evaluate=task.evaluate,
        sample=task.sample,
        stage="lora",
        identity=run,
        seed=params.seed,
        progress=console_progress(),
    )
    share = {"trainable_share": trainable_share(model)}
    copies = {name: paths.SFT / name for name in COPIED}
    settings = {"config": run["params"], "copies": copies}
    with build_artifact(paths.LORA_ADAPTER, kind="adapter", made_from=inputs, **settings) as draft:
        save_adapter(model, draft.path)
    figures = task.figures(merge_lora(model), result) | share
    inputs = [paths.SFT, paths.LORA_ADAPTER]
    with build_artifact(paths.LORA_MERGED, kind="lora", made_from=inputs, **settings) as draft:
        save_model(model, draft.path)
    write_outcome(paths.REPORTS, "lora", result, figures)


if __name__ == "__main__":
    run_stage(lora, on_ranks=True)
