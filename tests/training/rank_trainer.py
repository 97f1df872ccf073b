"""Teams of ranks that train the tiny model, for tests.

    python rank_trainer.py FOLDER < plan.json > outcomes.json

A plan is a list of runs, each `{"ranks": N, "mode": ..., "tp": ..., "over": {...}, "place": NAME,
"die": [rank, batch]}`, carried out one after the other. `ranks` 0 is a run without torchrun. Each
rank is a fork of this program, which never computes. An outcome is the exit codes of all and of
rank 0 the curve, the weights' hash and what it said.
"""

import json
import os
import signal
import socket
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import tiny_trainer
import torch
import torch._dynamo  # once, before the forks
import torch.distributed.checkpoint  # likewise
from tiny_trainer import Listener, die, fingerprint, run_tiny

from stages.runner import mistakes_in_one_line

SIZES = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_head": 8}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def be_rank(plan, rank, told):
    """Be the child: train, write what came of it, leave with the code a stage would have."""
    torch.set_num_threads(1)
    tiny_trainer.CONFIG = replace(tiny_trainer.CONFIG, **SIZES, **plan.get("sizes", {}))
    listener = Listener()
    outcome = {"said": listener.said}
    killed, at = plan.get("die", (None, None))

    def before(index):
        if (rank, index) == (killed, at):
            die()

    try:
        with mistakes_in_one_line():
            model, result, _ = run_tiny(
                plan["over"], before, listener, **{"evaluate": lambda model: {}, "sample": None}
            )
            outcome |= {"curve": [row["train_loss"] for row in result.curve[1:]]}
            outcome |= {"norms": [row["grad_norm"] for row in result.curve[1:]]}
            outcome |= {"hash": fingerprint(model, result)}
        code = 0
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if rank == 0:
        told.write_text(json.dumps(outcome))
    sys.stdout.flush()
    os._exit(code)


def carry_out(plan, folder):
    """Run one team; return rank 0's outcome and all exit codes."""
    os.environ["TINYLLM_INFLIGHT"] = str(folder / plan.get("place", "inflight"))
    told, port = folder / "outcome.json", free_port()
    told.unlink(missing_ok=True)
    children = []
    for rank in range(max(1, plan["ranks"])):
        child = os.fork()
        if child == 0:
            if plan["ranks"]:
                grid = {"RANK": rank, "WORLD_SIZE": plan["ranks"], "LOCAL_RANK": rank}
                grid |= {"LOCAL_WORLD_SIZE": plan["ranks"], "MASTER_ADDR": "127.0.0.1"}
                grid |= {"MASTER_PORT": port, "TINYLLM_PARALLEL": plan.get("mode", "ddp")}
                grid |= {"TINYLLM_TP": plan.get("tp", 1)}
                os.environ.update({name: str(value) for name, value in grid.items()})
            be_rank(plan, rank, told)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    outcome = json.loads(told.read_text()) if told.exists() else {}
    return {"codes": codes, **outcome}


if __name__ == "__main__":
    signal.alarm(300)
    place = Path(sys.argv[1])
    outcomes = [carry_out(plan, place) for plan in json.load(sys.stdin)]
    json.dump(outcomes, sys.stdout)
