"""The server under load: 16 streams at once, a soak with rude clients, a shared system message.

    python benchmarks/serve.py [MODEL_DIR] [--quick] [--threads 1]

Without a model directory a random one is made (d 256, 6 layers). The server is a process of its
own; clients speak HTTP over bare sockets, so that they cost little. The last line is one JSON
object. `equal` counts greedy answers that are the same alone and in company.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a spinning thread stalls a busy machine

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
from serve_client import CLIENTS, body_of, call, latencies, n_equal, read_metrics, running_server

from tinyllm.artifact import build_artifact
from tinyllm.inference.batching import Engine, Request
from tinyllm.inference.prefix import Prefix, compute_prefix
from tinyllm.inference.sampling import SamplingParams
from tinyllm.inference.session import Session, open_session
from tinyllm.model.directory import CHAT_TEMPLATE as TEMPLATE_FILE
from tinyllm.model.directory import TOKENIZER, save_model
from tinyllm.model.init import build_model
from tinyllm.model.sizes import ModelConfig
from tinyllm.quantization.load import load_any_model
from tinyllm.serving.server import model_name
from tinyllm.tokenizer.chat import CHAT_TEMPLATE
from tinyllm.tokenizer.train import TokenizerParams, train_bpe

SOAK_CLIENTS = 32
DISCONNECTED, MALFORMED = 0.10, 0.05
SYSTEM_TOKENS = 256
BAD_BODIES = (b"{", b"[]", b'{"model": 5}', b'{"temperature": NaN}', b"\xff\xfe", b"")


def main() -> None:
    """Run all parts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir", nargs="?", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tenth of the soak, fewer tokens")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    n_tokens, n_soak = (24, 100) if options.quick else (128, 1000)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = options.model_dir or build_random(Path(folder) / "random")
        with running_server(model_dir, Path(folder), options.threads) as (process, port):
            name = model_name(model_dir)
            results = asyncio.run(measure_streams(port, name, n_tokens))
            results |= asyncio.run(soak(port, name, n_soak, psutil.Process(process.pid)))
        torch.set_num_threads(options.threads)
        session = open_session(model_dir, load_any_model, torch.device("cpu"))
        results |= measure_prefix(session, rounds=5 if options.quick else 15)
    for key, value in results.items():
        print(f"{key:32} {value}")
    print(json.dumps(results))


def build_random(directory: Path) -> Path:
    """Write a model of random weights with a tokenizer of made-up words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeiounrstlm", k=rng.randint(2, 8))) for _ in range(500)]
    document = train_bpe(
        [" ".join(rng.choices(words, k=20000))],
        TokenizerParams(vocab_size=1024, min_count=2, sample_bytes=10**9),
    )
    config = ModelConfig(
        vocab_size=len(json.loads(document)["model"]["vocab"]),
        d=256,
        n_layers=6,
        n_heads=4,
        n_kv_heads=2,
        d_head=64,
        d_ff=704,
        qk_norm=True,
        tie_embeddings=False,
        rope_base=10000.0,
        norm_eps=1e-6,
        max_seq_len=1024,
    )
    model = build_model(config, 0).eval()
    with torch.no_grad():  # a fresh head repeats one token
        model.lm_head.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    with build_artifact(directory, kind="sft", made_from=[]) as draft:
        (draft.path / TOKENIZER).write_text(document, encoding="utf-8")
        (draft.path / TEMPLATE_FILE).write_text(CHAT_TEMPLATE, encoding="utf-8")
        save_model(model, draft.path)
    return directory


def prompts(n: int, length: int, seed: int) -> list[list[int]]:
    """Return random prompts, none of which begins like another."""
    rng = random.Random(seed)
    return [[rng.randrange(10, 300) for _ in range(length)] for _ in range(n)]


async def measure_streams(port: int, name: str, n_tokens: int) -> dict[str, Any]:
    """Compare 16 streams at once with the same ones after each other."""
    # logprobs make every token an event of its own
    bodies = [body_of(name, prompt, n_tokens, logprobs=0) for prompt in prompts(CLIENTS, 32, 1)]
    await call(port, bodies[0])  # warm-up
    started_s = time.perf_counter()
    alone = [await call(port, body) for body in bodies]
    alone_s = time.perf_counter() - started_s
    others = [body_of(name, prompt, 1, logprobs=0) for prompt in prompts(CLIENTS, 32, 9)]
    await asyncio.gather(*(call(port, body) for body in others))  # no slot knows the prompts now
    started_s = time.perf_counter()
    together = await asyncio.gather(*(call(port, body) for body in bodies))
    together_s = time.perf_counter() - started_s
    n_alone, n_together = (
        sum(len(stream.token_s) for stream in streams) for streams in (alone, together)
    )
    return {
        "clients": CLIENTS,
        "alone_tokens_per_s": round(n_alone / alone_s, 1),
        "together_tokens_per_s": round(n_together / together_s, 1),
        "together_to_alone": round(n_together / together_s / (n_alone / alone_s), 2),
        **latencies(together),
        "equal": n_equal(alone, together),
    }


async def soak(port: int, name: str, n: int, server: psutil.Process) -> dict[str, Any]:
    """Send many calls, some of them rude; see what the server keeps of them."""
    rng = random.Random(2)
    gate, statuses = asyncio.Semaphore(SOAK_CLIENTS), Counter[int]()
    kinds: Counter[str] = Counter()
    asked = prompts(n, 12, 3)
    memory: list[int] = []

    async def one(i: int) -> None:
        """Be one client."""
        async with gate:
            if i % (n // 10) == 0:
                memory.append(server.memory_info().rss)
            luck, leave_after = rng.random(), None
            kind, body = "whole", body_of(name, asked[i], rng.randint(1, 12), logprobs=0)
            if luck < MALFORMED:
                kind, body = "malformed", rng.choice(BAD_BODIES)
            elif luck < MALFORMED + DISCONNECTED:
                kind, leave_after = "left", rng.randint(1, 4)
                body = body_of(name, asked[i], 500, logprobs=0)
            kinds[kind] += 1
            stream = await call(port, body, leave_after)
            statuses[stream.status] += 1

    await asyncio.gather(*(one(i) for i in range(n)))
    await asyncio.sleep(1)
    memory.append(server.memory_info().rss)
    gauges = await read_metrics(port)
    return {
        "soak_requests": n,
        "soak_left": kinds["left"],
        "soak_malformed": kinds["malformed"],
        "soak_statuses": {str(status): count for status, count in sorted(statuses.items())},
        "soak_5xx": sum(count for status, count in statuses.items() if status >= 500),
        "soak_slots_left": int(gauges["tinyllm_running"] + gauges["tinyllm_waiting"]),
        "soak_memory_growth": round(memory[-1] / memory[len(memory) // 2] - 1, 4),
    }


def measure_prefix(session: Session, rounds: int) -> dict[str, Any]:
    """Time the first token behind a long system message, without and with its prefix."""
    start, *questions = prompts(1, SYSTEM_TOKENS, 4) + prompts(rounds, 12, 5)
    prefix = compute_prefix(session.model, start)
    times: dict[bool, list[float]] = {False: [], True: []}
    for question in questions:
        for has_prefix in (False, True):
            times[has_prefix].append(
                first_token_ms(session, [*start, *question], [prefix] if has_prefix else [])
            )
    cold, warm = (statistics.median(times[kind]) for kind in (False, True))
    return {
        "prefix_tokens": SYSTEM_TOKENS,
        "prefix_first_token_ms_cold": round(cold, 2),
        "prefix_first_token_ms": round(warm, 2),
        "prefix_speedup": round(cold / warm, 2),
    }


def first_token_ms(session: Session, prompt: list[int], prefixes: list[Prefix]) -> float:
    """Return the time a fresh engine takes for the first token of a prompt."""
    engine = Engine(
        session.model, (), n_slots=1, chunk_tokens=512, max_waiting=1, prefixes=prefixes
    )
    request = Request(prompt_ids=prompt, sampling=SamplingParams(max_new_tokens=1))
    started_s = time.perf_counter()
    engine.submit(request)
    while not engine.is_idle:
        engine.step()
    return 1e3 * (time.perf_counter() - started_s)


if __name__ == "__main__":
    main()
