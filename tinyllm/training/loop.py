"""Training for pretraining, SFT and LoRA: what stands around the steps of `run.py`.

A run that was killed goes on where its last checkpoint was, and ends with the same bits. Several
ranks (`parallel.py`) make the same steps together; rank 0 alone evaluates, tells and returns.
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from tinyllm import paths
from tinyllm.errors import Interrupted, ParamsError
from tinyllm.model.transformer import Transformer
from tinyllm.progress import Progress
from tinyllm.shards.batches import Batches
from tinyllm.training.determinism import deterministic
from tinyllm.training.parallel import open_team
from tinyllm.training.params import TrainingParams
from tinyllm.training.precision import choose_device, use_threads
from tinyllm.training.rng import seed_everything
from tinyllm.training.run import Evaluate, Run, Sample, TrainResult
from tinyllm.training.state import State, Store, open_store
from tinyllm.training.stop import watch


def train(
    model: Transformer,
    params: TrainingParams,
    batches: Batches,
    *,
    evaluate: Evaluate,
    sample: Sample | None,
    stage: str,
    identity: Mapping[str, Any],
    seed: int,
    progress: Progress,
    fresh: bool = False,
) -> TrainResult:
    """Train the parameters of `model` that require a gradient, in place; it ends on the CPU.

    Args:
        model: in fp32.
        params: the run's knobs.
        batches: micro-batch i of the run is `batches.batch(i)`, wherever the run is resumed.
        evaluate: figures of the model as it is, for the curve; called in evaluation mode.
        sample: a text by the model as it is, likewise; None: no samples.
        stage: names the folder of the stored state and the progress.
        identity: JSON values of everything that shapes the trajectory; a stored run with the same
            identity is resumed.
        seed: of the global random generators.
        progress: what is told meanwhile.
        fresh: the weights are untrained, which the preflight should find true.

    Raises:
        ParamsError: sequences are longer than the model serves.
        TrainingError: the loss is not finite, or another process trains this run.
        Interrupted: stopped by a signal or because DVC died; the state is saved. Also on every rank
            but the first, when all is done: the others leave, rank 0 writes the results.
    """
    if params.seq_len > model.config.max_seq_len:
        raise ParamsError(
            f"{stage}.seq_len: {params.seq_len} is more than the model serves;"
            f" raise model.max_seq_len = {model.config.max_seq_len} or lower it"
        )
    device, threads = choose_device(), use_threads()
    seed_everything(seed)
    with ExitStack() as stack:
        team = stack.enter_context(open_team(device))
        team.check(params, stage)
        root = paths.inflight_root()
        store = stack.enter_context(open_store(root, stage, identity, progress, team))
        watching = stack.enter_context(watch(team.largest))
        stored = _find_state(store, stage, progress)
        run = Run(model, params, batches, evaluate, sample, stage, device, store, progress, team)
        run.begin(stored, threads, fresh=fresh)
        with deterministic(wanted=run.stepper.compiled and device.type == "cpu"):
            run.finish(watching)
        run.stepper.use_average()
        run.collect()
        store.prune_others()
        if not team.is_main:
            raise Interrupted("", code=0)
        result = run.result()
    model.to("cpu").eval()
    return result


def _find_state(store: Store, stage: str, progress: Progress) -> State | None:
    """Return the state to resume, and say what is done and why."""
    if os.environ.get("TINYLLM_FRESH") == "1":
        store.clear()
        progress.say(f"{stage}: FRESH, as TINYLLM_FRESH=1 asks")
        return None
    state = store.load()
    if state is not None:
        progress.say(f"{stage}: RESUME at step {state['step']}")
        return state
    others = store.differences()
    known = f"; another run is stored {others[0]}" if others else ""
    progress.say(f"{stage}: FRESH{known}")
    return None
