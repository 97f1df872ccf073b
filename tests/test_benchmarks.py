"""The comparisons of benchmarks/ as their readers run them: a table, then one JSON object."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processor_time import processor_s
from tiny_text import made_up_text

FOLDER = Path(__file__).parent.parent / "benchmarks"
QUICK = (
    "adamw8bit",
    "attention",
    "attention_kinds",
    "cache_formats",
    "decode",
    "interop",
    "memory",
    "onnx_static",
    "throughput",
    "time_to_loss",
    "transformers_equality",
    "weight_bits",
)
LIMIT_S = 50


@pytest.mark.slow  # a quarter to a whole minute each
@pytest.mark.parametrize("name", QUICK)
def test_quick_ends_in_time_with_one_json_object(name, tmp_path):
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick"]
    if name == "time_to_loss":
        text = tmp_path / "text.txt"
        text.write_text(made_up_text(40_000), encoding="utf-8")
        command += ["--text", str(text)]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}  # not an installed tree
    started_s, computed_s = time.perf_counter(), processor_s()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    seconds = min(time.perf_counter() - started_s, processor_s() - computed_s)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert table
    assert isinstance(json.loads(last), dict)
    assert seconds < LIMIT_S
    if name == "decode":
        logits = [row["logits"] for row in json.loads(last).values()]
        assert all(x < 0.15 for row in logits for key, x in row.items() if key.endswith("off"))


def test_a_context_that_is_too_long_for_the_model_is_one_line():
    command = [sys.executable, str(FOLDER / "onnx_static.py"), "--quick", "--context", "99999"]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    *usage, last = done.stderr.splitlines()
    assert usage[0].startswith("usage:")
    assert "max_seq_len" in last
    assert "--context 99999 one more than itself" in last
