"""Sixteen streams at once: our server on INT8 weights beside llama-cpp-python's on Q8_0 ones.

    python benchmarks/serve_llama.py data/models/pretrain [--quick] [--threads 2]

Both formats are written from the float weights of a model that writes text: what random ones write
is no UTF-8, and llama-cpp-python holds such tokens back. The servers are processes of their own
that take turns; the same clients speak HTTP to both. Needs llama-cpp-python with its extra
`server`. The last line is one JSON object.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from serve_client import CLIENTS, Stream, body_of, call, latencies, n_equal, running_server

from tinyllm.artifact import build_artifact
from tinyllm.export.gguf import write_gguf
from tinyllm.model.directory import CHAT_TEMPLATE, TOKENIZER, load_model
from tinyllm.quantization.directory import save_quantized_model
from tinyllm.quantization.int8 import quantize_model
from tinyllm.serving.server import model_name

PROMPT_WORDS = 12


def main() -> None:
    """Write both formats, run both servers, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--quick", action="store_true", help="one round of few tokens")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if find_spec("llama_cpp") is None:
        print(json.dumps({"missing": "llama-cpp-python"}))
        return
    n_tokens, n_rounds = (24, 1) if options.quick else (128, 5)
    with tempfile.TemporaryDirectory() as folder:
        int8_dir, gguf_file = Path(folder) / "int8", Path(folder) / "model.gguf"
        write_int8(options.model_dir, int8_dir)
        write_gguf(options.model_dir, gguf_file, "q8_0")
        with (
            running_server(int8_dir, Path(folder), options.threads) as (_, port),
            llama_server(gguf_file, options.threads) as llama_port,
        ):
            servers = {"tinyllm": (port, model_name(int8_dir)), "llama.cpp": (llama_port, "model")}
            figures = asyncio.run(measure(servers, n_tokens, n_rounds))
    print(f"{'':12}{'tokens/s':>10}{'first token ms':>16}{'between tokens ms':>19}{'equal':>8}")
    for name, row in figures.items():
        first, between = (
            f"{row[f'{kind}_ms_p50']:.1f} / {row[f'{kind}_ms_p95']:.1f}"
            for kind in ("first_token", "between_tokens")
        )
        print(f"{name:12}{row['tokens_per_s']:10.0f}{first:>16}{between:>19}{row['equal']:8}")
    ratio = figures["tinyllm"]["tokens_per_s"] / figures["llama.cpp"]["tokens_per_s"]
    print(json.dumps({"ratio": round(ratio, 2), "clients": CLIENTS, **figures}))


def write_int8(source: Path, directory: Path) -> None:
    """Quantise a float model directory."""
    with build_artifact(directory, kind="int8", made_from=[source]) as draft:
        for name in (TOKENIZER, CHAT_TEMPLATE):
            (draft.path / name).write_bytes((source / name).read_bytes())
        save_quantized_model(quantize_model(load_model(source)), draft.path)


@contextmanager
def llama_server(model: Path, threads: int) -> Iterator[int]:
    """Run llama-cpp-python's server; streams wait for each other instead of breaking off."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    settings = {
        "model": model, "model_alias": "model", "host": "127.0.0.1", "port": port, "n_ctx": 1024,
        "n_threads": threads, "n_threads_batch": threads, "interrupt_requests": False,
        "verbose": False,
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    # it waits as it does by default: passive OpenMP makes llama.cpp 8 times slower on 2 threads
    environment = {name: x for name, x in os.environ.items() if name != "OMP_WAIT_POLICY"}
    process = subprocess.Popen(
        [sys.executable, "-m", "llama_cpp.server", *words], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    yield port
                    return
            time.sleep(0.1)
        raise SystemExit("llama-cpp-python's server did not start; it wants its [server] extra")
    finally:
        process.terminate()
        process.wait(30)


async def measure(
    servers: dict[str, tuple[int, str]], n_tokens: int, n_rounds: int
) -> dict[str, dict[str, Any]]:
    """Let the servers take turns with sixteen streams at once; medians of the rounds."""
    rng = random.Random(1)
    texts = ["".join(rng.choices("aeiounrstlm ", k=5 * PROMPT_WORDS)) for _ in range(CLIENTS)]
    bodies = {
        name: [body_of(model, text, n_tokens) for text in texts]
        for name, (_, model) in servers.items()
    }
    alone = {  # also the warm-up
        name: [await call(port, body) for body in bodies[name]]
        for name, (port, _) in servers.items()
    }
    speeds: dict[str, list[float]] = {name: [] for name in servers}
    streams: dict[str, list[Stream]] = {name: [] for name in servers}
    for _ in range(n_rounds):
        for name, (port, _) in servers.items():
            started_s = time.perf_counter()
            together = await asyncio.gather(*(call(port, body) for body in bodies[name]))
            n_seen = sum(len(stream.token_s) for stream in together)
            speeds[name].append(n_seen / (time.perf_counter() - started_s))
            streams[name] = together
    figures = {}
    for name, seen in streams.items():
        figures[name] = {
            "tokens_per_s": round(statistics.median(speeds[name]), 1),
            **latencies(seen),
            "equal": n_equal(alone[name], seen),
        }
    return figures


if __name__ == "__main__":
    main()
