"""What runs on a card, as far as it goes without one: the emulator takes the measurements' way."""

import json

import emulator
import gpu
import gpu_check
import gpu_kernels
import perf_table
import pytest
import torch

from tinyllm.ops import cuda_driver

CPU = torch.device("cpu")


@pytest.mark.parametrize("command", [gpu.main, gpu_check.main])
def test_without_a_card_one_line_says_so(monkeypatch, capsys, command):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["command"])
    assert command() == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "no CUDA device" in line


def test_the_parts_fit_into_eight_minutes(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert sum(most_s for _, _, most_s in gpu_check.parts()) <= 8 * 60


@pytest.fixture
def measured(monkeypatch):
    """A result of the whole way, on CPU tensors at tiny sizes."""
    monkeypatch.setattr(cuda_driver, "run", emulator.run)
    return {"card": "NVIDIA GeForce RTX 3060", **gpu.measure(CPU, tiny=True)}


@pytest.mark.slow  # every kernel is compiled for the emulator
def test_every_measurement_can_be_made_and_shown(measured):
    result = json.loads(json.dumps(measured))
    for row in result["kernels"]:
        assert row["ms"]["ours"] > 0
    text = perf_table.page([result])
    assert "## RTX 3060" not in text
    assert text.count("not measured") == 4
    assert "| RMSNorm | rows 3, width 64 |" in text
    assert "Pretraining, preset smoke" in text


def test_cards_never_run_are_not_measured():
    text = perf_table.page([])
    for card in perf_table.CARDS:
        assert f"## {card}\n\nnot measured" in text


def test_the_committed_page_is_that_of_the_committed_results():
    assert perf_table.TARGET.read_text() == perf_table.page(perf_table.load(perf_table.RESULTS))


def test_shares_are_of_the_ceiling_that_binds():
    ceilings = {"copy_gb_per_s": 1000.0, "bf16_tflop_per_s": 100.0}
    assert perf_table.share({"bytes": 5e8, "ms": {"ours": 1.0}}, ceilings) == 0.5
    assert perf_table.share({"flops": 5e10, "ms": {"ours": 1.0}}, ceilings) == 0.5


def test_ceilings_are_rates():
    rates = gpu_kernels.ceilings(CPU, 64, 4096, 1)
    assert set(rates) == {"copy_gb_per_s", "bf16_tflop_per_s", "int8_top_per_s"}
