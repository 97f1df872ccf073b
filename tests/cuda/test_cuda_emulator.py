"""What benchmarks/cuda_emulator.py counts is what passed."""

from types import SimpleNamespace

import cuda_emulator
import emulator
import pytest
from cuda_launches import FORMATS, launches

MUTANTS = ["t.py::test_a_fault_is_noticed[one]", "t.py::test_a_fault_is_noticed[two]"]


def report(nodeid, when, *, passed):
    return SimpleNamespace(nodeid=nodeid, when=when, passed=passed)


def item(nodeid):
    of = SimpleNamespace(params={"mutant": SimpleNamespace(file="rows.h")})
    return SimpleNamespace(nodeid=nodeid, originalname="test_a_fault_is_noticed", callspec=of)


@pytest.fixture
def watch(monkeypatch):
    monkeypatch.setattr(emulator, "run", lambda *_: 0)
    watch = cuda_emulator.Watch()
    watch.pytest_collection_finish(SimpleNamespace(items=[item(nodeid) for nodeid in MUTANTS]))
    return watch


def after(watch, nodeid, *runs, passed=True):
    """A test that launches and ends."""
    for launch, seed in runs:
        emulator.run(launch, seed)
    for when in ("setup", "call", "teardown"):
        watch.pytest_runtest_logreport(report(nodeid, when, passed=passed or when != "call"))


def test_launches_of_passing_tests_count_by_shape_and_seed(watch):
    (narrow, *_), (wide, *_) = (launches("sm_86", FORMATS[:1], [(w, w)]) for w in (32, 64))
    after(watch, "t.py::test", (narrow, 0), (narrow, 1), (wide, 0))
    after(watch, "t.py::other", (narrow, 2), passed=False)
    after(watch, MUTANTS[0], (narrow, 2))
    (kernel,) = watch.kernels.values()
    assert (len(kernel.shapes), kernel.seeds, kernel.runs) == (2, {0, 1}, 3)


def test_mutants_are_caught_by_tests_that_pass(watch):
    after(watch, MUTANTS[0])
    after(watch, MUTANTS[1], passed=False)
    assert (watch.caught["rows.h"], list(watch.mutants.values())) == (1, ["rows.h", "rows.h"])


def test_sizes_count_and_addresses_do_not(watch):
    here, there = (launches("sm_86", FORMATS[:1], [(32, 32)])[0] for _ in range(2))
    there.arguments.lse = here.arguments.lse + 64
    after(watch, "t.py::test", (here, 0), (there, 0))
    there.arguments.n_tokens += 1
    after(watch, "t.py::test", (there, 0))
    assert len(watch.kernels[here.entry].shapes) == 2
