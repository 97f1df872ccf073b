import logging
import os
import subprocess
import sys

import pytest
import torch

from tinyllm.errors import TinyllmError
from tinyllm.ops import build, cpu, registry
from tinyllm.ops.linear import linear_w8a8, quantize_per_row

X = torch.arange(12.0).view(3, 4)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A machine that has built nothing yet."""
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "cache"))
    for name in ("TINYLLM_KERNELS", "TINYLLM_CPU_ISA", "CXX"):
        monkeypatch.delenv(name, raising=False)
    cpu.load.cache_clear()
    yield tmp_path
    cpu.load.cache_clear()


@pytest.fixture
def no_compiler(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))


def backend_of(operation):
    return next(row for row in registry.describe() if row.operation == operation)


def test_without_a_compiler_torch_computes_and_one_line_says_so(no_compiler, caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            y = linear_w8a8(X, *quantize_per_row(X))
    assert registry.select("linear_w8a8", X).backend == "torch"
    assert registry.select("quantize_per_row", X).backend == "reference"
    assert torch.allclose(y, X @ X.T, rtol=0.02)
    (line,) = caplog.records
    assert "no C++ compiler" in line.getMessage()


def test_without_a_compiler_doctor_gives_the_reason(no_compiler):
    row = backend_of("linear_w8a8")
    assert row.backend == "torch"
    assert "no C++ compiler" in row.why


@pytest.mark.parametrize("variable", ["CXX"])
def test_a_compiler_that_does_not_exist(fresh, monkeypatch, variable, caplog):
    monkeypatch.setenv(variable, "/no/such/compiler")
    linear_w8a8(X, *quantize_per_row(X))
    assert len(caplog.records) == 1


def test_a_compiler_that_fails_is_told_in_one_line(fresh, monkeypatch, caplog):
    fake = fresh / "g++"
    fake.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x: error: broken" >&2\nexit 1\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    linear_w8a8(X, *quantize_per_row(X))
    (line,) = caplog.records
    assert "g++ failed: x: error: broken" in line.getMessage()
    assert sorted(p.suffix for p in (fresh / "cache").iterdir()) == [".lock"]


def test_an_unwritable_cache_falls_back(fresh, monkeypatch, caplog):
    (fresh / "file").write_text("")
    monkeypatch.setenv("TINYLLM_CACHE", str(fresh / "file"))
    linear_w8a8(X, *quantize_per_row(X))
    assert "torch" in caplog.text


def test_another_processor_falls_back(fresh, monkeypatch, caplog):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert registry.select("linear_w8a8", X).backend == "torch"
    assert "aarch64" in backend_of("linear_w8a8").why


def test_describing_compiles_nothing(fresh):
    row = backend_of("linear_w8a8")
    assert not (fresh / "cache").exists()
    if build.obstacle() is None:
        assert row.backend == "cpu"
        assert "first use" in row.why


def test_doctor_names_only_backends_that_an_operation_has(monkeypatch):
    monkeypatch.delenv("TINYLLM_KERNELS", raising=False)
    for operation, implementations in registry.OPERATIONS.items():
        assert backend_of(operation).backend in [each.backend for each in implementations]
    assert (backend_of("rope").backend, backend_of("rope").why) == ("reference", "no C++ of ours")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_forced_backend_is_taken(monkeypatch, backend):
    monkeypatch.setenv("TINYLLM_KERNELS", backend)
    assert registry.select("linear_w8a8", X).backend == backend
    row = backend_of("linear_w8a8")
    assert (row.backend, row.why) == (backend, f"TINYLLM_KERNELS={backend}")
    assert backend_of("quantize_per_row").backend == "reference"


def test_forced_backend_that_cannot_run_is_a_mistake(no_compiler, monkeypatch):
    monkeypatch.setenv("TINYLLM_KERNELS", "cpu")
    with pytest.raises(TinyllmError, match="no C\\+\\+ compiler"):
        registry.select("linear_w8a8", X)
    assert "no C++ compiler" in backend_of("linear_w8a8").why


def test_unknown_backend_is_a_mistake(monkeypatch):
    monkeypatch.setenv("TINYLLM_KERNELS", "tpu")
    with pytest.raises(TinyllmError, match="tpu"):
        registry.select("linear_w8a8", X)
    assert "tpu" in backend_of("linear_w8a8").why


def test_other_devices_go_past_the_native_kernels():
    assert registry.select("linear_w8a8", X.to("meta")).backend == "torch"


def test_every_operation_ends_with_the_reference():
    for implementations in registry.OPERATIONS.values():
        assert implementations[-1].backend == "reference"
        assert [i.backend for i in implementations] == sorted(
            (i.backend for i in implementations), key=registry.BACKENDS.index
        )


def test_build_ahead_makes_one_library_for_two_processes(fresh):
    if reason := build.obstacle():
        pytest.skip(reason)
    command = [sys.executable, "-m", "tinyllm.ops.build"]
    both = [
        subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        assert process.communicate(timeout=200)[1].startswith("built ")
        assert process.returncode == 0
    (made,) = (fresh / "cache").glob("*.so")
    assert made == build.library_path()
    assert not list((fresh / "cache").glob("*.tmp"))
