import itertools

import emulator
import mutants
import pytest
import torch
from attention_case import NAMES, Case

pytestmark = pytest.mark.usefixtures("poisoned")

CASES = [  # several blocks of keys, some whole and some not, for documents and for a window
    Case(1, 4, 2, 140, 32, 32, documents=True),
    Case(1, 2, 1, 150, 32, 32, window=90),
]
CASES[0].document_ids = (torch.arange(140) >= 100).long()[None]


def noticed(mutant):
    """Return what gives the fault away, None if nothing does."""
    edits = ((mutant.file, mutant.old, mutant.new),)
    for seed, case in itertools.product(range(3), CASES):
        steps = case.run(seed, edits)
        try:
            o, lse = next(steps)
            if failures := case.failures([o], NAMES[:1]):
                return f"wrong: {failures}"
            if not torch.allclose(lse.double(), case.exact_lse, rtol=1e-4):
                return "wrong: lse"
            if mutant.file != mutants.FORWARD and (
                failures := case.failures(next(steps), NAMES[1:])
            ):
                return f"wrong: {failures}"
        except emulator.EmulatorError as error:
            return str(error)
    return None


def test_no_fault_is_seen_where_there_is_none():
    assert (
        noticed(mutants.Mutant("none", mutants.FORWARD, "(next, half ^ 1)", "(next, 1 ^ half)"))
        is None
    )


@pytest.mark.parametrize("mutant", mutants.ATTENTION, ids=lambda m: f"{m.file}: {m.fault}")
def test_a_fault_is_noticed(mutant):
    assert noticed(mutant), "no shape and no order of the warps gives it away"
