"""A tiny training run that can be made to die, for tests; also a program that makes many of them.

    python tiny_trainer.py FOLDER < plan.json > outcomes.json

A plan is a list of attempts, each `{"death": NAME or null, "n": COUNT, "over": {...}}`, carried out
one after the other in forked children on one stored state. The parent never computes, so a fork is
safe. An outcome is `{"code": exit code or -signal, "hash": ... or null, "said": [...]}`.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # the optimizers import it: once, before the forks

from stages.runner import mistakes_in_one_line
from tinyllm.model.init import build_model
from tinyllm.model.sizes import ModelConfig
from tinyllm.shards.batches import Batch
from tinyllm.training import state
from tinyllm.training.loop import train
from tinyllm.training.params import TrainingParams

CONFIG = ModelConfig(
    vocab_size=48,
    d=32,
    n_layers=1,
    n_heads=2,
    n_kv_heads=1,
    d_head=16,
    d_ff=64,
    qk_norm=True,
    tie_embeddings=True,
    rope_base=10000.0,
    norm_eps=1e-6,
    max_seq_len=16,
)
KNOBS = {
    "steps": 24,
    "seq_len": 16,
    "batch_size": 2,
    "accumulate": 2,
    "optimizer": "muon",
    "lr": 0.003,
    "muon_lr": 0.02,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "schedule": "wsd",
    "warmup_steps": 3,
    "decay_share": 0.5,
    "min_lr_share": 0.0,
    "clip_norm": 1.0,
    "precision": "bf16",
    "compile": "off",
    "checkpoint": "none",
    "ema_decay": 0.0,
    "spike_factor": 0.0,
    "diagnostics": False,
    "preflight": False,
    "log_every": 4,
    "eval_every": 6,
    "sample_every": 10,
    "save_every": 5,
}


class Listener:
    """A progress that keeps what it is told."""

    def __init__(self):
        self.said = []

    def say(self, message):
        self.said.append(message)

    def step(self, task, done, total, **figures):
        pass


class CountingBatches:
    """Sentences that count: token t is followed by t + stride, the stride told by the row."""

    def __init__(self, knobs, before=lambda index: None):
        self.knobs, self.before, self.asked = knobs, before, []

    def batch(self, index):
        self.before(index)
        self.asked.append(index)
        rng = np.random.default_rng([3, index])
        rows, columns = self.knobs.batch_size, self.knobs.seq_len + 1
        start, stride = rng.integers(0, 48, (rows, 1)), rng.integers(1, 3, (rows, 1))
        tokens = (start + stride * np.arange(columns)) % CONFIG.vocab_size
        return Batch(ids=tokens[:, :-1].copy(), targets=tokens[:, 1:].copy(), document_ids=None)


def figures(model):
    """Return a figure that depends on every bit of the weights and on a global random draw."""
    total = sum(parameter.double().sum() for parameter in model.parameters())
    return {"val_loss": float(total), "val_draw": float(torch.rand(()))}


def run_tiny(over=None, before=lambda index: None, progress=None, **others):
    """Train; return the model, the result and the batches that were asked for."""
    knobs = TrainingParams(**{**KNOBS, **(over or {})})
    model = build_model(CONFIG, seed=5)
    batches = CountingBatches(knobs, before)
    visible = {"diagnostics", "preflight", "log_every", "eval_every", "sample_every", "save_every"}
    shaping = {key: value for key, value in {**KNOBS, **(over or {})}.items() if key not in visible}
    arguments = {
        "evaluate": figures,
        "sample": lambda model: f"{float(model.embed_tokens.weight.sum()):.9f}",
        "stage": "tiny",
        "identity": {"params": {"tiny": shaping}},
        "seed": 7,
        "progress": progress or Listener(),
    }
    return model, train(model, knobs, batches, **{**arguments, **others}), batches


def fingerprint(model, result):
    """Return a hash over all weights, the curves and the samples."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    digest.update(json.dumps([result.curve, result.gradients, result.samples]).encode())
    return digest.hexdigest()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def nth_call(n, function, instead):
    """Return `function`, whose call number n is `instead`."""
    count = 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return instead(*args, **kwargs) if count == n else function(*args, **kwargs)

    return counted


def arrange_death(death, n):
    """Prepare how this process dies; return what to do before batch number `index`."""
    real_save, real_sync, real_rename = torch.save, state._sync, Path.rename
    real_rmtree = shutil.rmtree

    def half_a_file(content, path):
        real_save(content, path)
        os.truncate(path, path.stat().st_size // 2)
        die()

    def rename_and_die(path, target):
        real_rename(path, target)
        die()

    def remove_half_and_die(path, **kwargs):
        next(iter(sorted(path.iterdir()))).unlink()
        die()

    def remove(path, **kwargs):
        return counted_rmtree(path, **kwargs) if Path(path).exists() else None

    if death == "in save":
        torch.save = nth_call(n, real_save, half_a_file)
    elif death == "in sync":
        state._sync = nth_call(n, real_sync, lambda path: die())
    elif death == "before rename":
        Path.rename = nth_call(n, real_rename, lambda path, target: die())
    elif death == "after rename":
        Path.rename = nth_call(n, real_rename, rename_and_die)
    elif death == "in removal":
        counted_rmtree = nth_call(n, real_rmtree, remove_half_and_die)
        shutil.rmtree = remove
    number = {"at batch": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT}.get(death)

    def before(index):
        if index == n and number is not None:
            os.kill(os.getpid(), number)

    return before


def attempt(plan, folder):
    """Be the child: run, write what came of it, and leave with the code a stage would have."""
    listener = Listener()
    outcome = {"hash": None, "said": listener.said}
    try:
        with mistakes_in_one_line():
            before = arrange_death(plan.get("death"), plan.get("n", 0))
            model, result, _ = run_tiny(plan.get("over"), before, listener)
            outcome |= {"hash": fingerprint(model, result), "metrics": result.metrics}
        code = 0
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = 1
    (folder / "outcome.json").write_text(json.dumps(outcome))
    os._exit(code)


def carry_out(plan, folder):
    """Run one attempt in a child; `after_s` kills it from outside after so many seconds."""
    told = folder / "outcome.json"
    told.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(plan.get("threads", 2))
        attempt(plan, folder)
    if "after_s" in plan:
        time.sleep(plan["after_s"])
        os.kill(child, signal.SIGKILL)  # not yet waited for, so the pid is still its own
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    outcome = json.loads(told.read_text()) if told.exists() else {"hash": None, "said": []}
    return {"code": status, **outcome}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(exist_ok=True)
    os.environ["TINYLLM_INFLIGHT"] = str(place / "inflight")
    outcomes = [carry_out(plan, place) for plan in json.load(sys.stdin)]
    json.dump(outcomes, sys.stdout)
