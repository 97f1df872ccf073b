"""Attention's kernel for Hopper in the emulator, as it is and with faults."""

import emulator
import hopper_mutants
import pytest
import torch
from attention_case import NAMES, Case
from mutants import Mutant

from tinyllm.errors import TinyllmError
from tinyllm.ops import cuda, cuda_attention, cuda_driver, cuda_hopper

pytestmark = pytest.mark.usefixtures("poisoned")

SEEDS = (0, 1, 2)
CASES = [
    Case(2, 4, 2, 1, 64, 64, hopper=True),
    Case(1, 2, 1, 300, 64, 64, hopper=True),
    Case(1, 4, 2, 67, 64, 64, hopper=True, dtype=torch.float16),
    Case(2, 2, 1, 431, 64, 64, hopper=True, documents=True, window=140),
    Case(1, 1, 1, 270, 128, 128, hopper=True, window=30),
]
MANY = [
    *(
        Case(1, 2, 1, 290, k, e, hopper=True, dtype=dtype, documents=documents, window=window)
        for k in cuda_hopper.WIDTHS
        for e in cuda_hopper.WIDTHS
        for dtype in cuda_attention.FORMATS
        for documents, window in ((False, 0), (True, 0), (False, 129), (True, 1))
    ),
    Case(1, 1, 1, 900, 64, 64, hopper=True, documents=True),
    Case(1, 2, 1, 190, 64, 64, hopper=True, size=30.0),
]


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """Let the card be a Hopper."""
    monkeypatch.setattr(cuda_hopper, "is_hopper", lambda: True)


def check(case):
    first = None
    for seed in SEEDS:
        o, lse = next(case.run(seed))
        assert case.failures([o], NAMES[:1]) == []
        torch.testing.assert_close(lse.double(), case.exact_lse, rtol=1e-4, atol=1e-5)
        first = first or (o, lse)
        assert torch.equal(o, first[0]), "the order of warps changes a bit"
        assert torch.equal(lse, first[1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_within_that_of_torch_in_the_same_format(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_every_width_format_document_and_window(case):
    check(case)


def test_the_other_kernels_go_on_with_its_results():
    """The backward kernels take its output and its log-sum-exp."""
    case = Case(1, 2, 1, 150, 64, 64, hopper=True)
    (o, _), gradients = case.run(0)
    assert case.failures([o, *gradients]) == []


def test_what_is_invisible_has_no_influence_at_all():
    q, k, v, _ = Case(1, 2, 1, 300, 64, 64).tensors
    documents = (torch.arange(300) >= 200).long()[None]

    def run(k, v):
        def as_hopper(launch):
            emulator.run(cuda_hopper.of(launch))

        return cuda_attention.forward(as_hopper, q, k, v, documents, 40, 0.125)[0]

    clean = run(k, v)
    spoilt_k, spoilt_v = k.clone(), v.clone()
    for x in (spoilt_k, spoilt_v):
        x[:, :, 100:] = 9e9  # the future of 60 .. 99
        x[:, :, :20] = -9e9  # beyond their window
    assert torch.equal(run(spoilt_k, spoilt_v)[:, :, 60:100], clean[:, :, 60:100])
    spoilt_k, spoilt_v = k.clone(), v.clone()
    spoilt_k[:, :, :200] = spoilt_v[:, :, :200] = 9e9
    assert torch.equal(run(spoilt_k, spoilt_v)[:, :, 200:], clean[:, :, 200:])


def test_heads_of_one_projection_and_single_positions():
    """Strides as the model has them: queries, keys and values side by side, any order in memory."""
    qkv = Case(2, 8, 2, 70, 64, 64).tensors[0]  # (B, 8 heads, T, width), heads between T and width
    q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    results = []
    for some in ((q, k, v), [x.contiguous() for x in (q, k, v)], [x[:1] for x in (q, k, v)]):
        launched = []

        def as_hopper(launch, launched=launched):
            launched.append(cuda_hopper.of(launch))
            emulator.run(launched[-1])

        results.append(cuda_attention.forward(as_hopper, *some, None, 0, 0.125)[0])
        assert launched[0].entry == cuda_hopper.ENTRY
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0][:1], results[2])


def test_it_runs_only_if_it_is_wanted_and_can(monkeypatch):
    ran = []
    monkeypatch.setattr(cuda_driver, "run", lambda launch: ran.append(launch.entry))
    heads = {width: Case(1, 1, 1, 5, width, width).tensors[:3] for width in (64, 96)}

    def forward(width=64):
        ran.clear()
        cuda_attention.forward(cuda.run, *heads[width], None, 0, 1.0)
        return ran[0]

    monkeypatch.delenv(cuda_hopper.VARIABLE, raising=False)
    assert forward() == "attention_forward"
    monkeypatch.setenv(cuda_hopper.VARIABLE, "hopper")
    assert forward() == "attention_forward_hopper"
    assert forward(96) == "attention_forward"
    monkeypatch.setattr(cuda_hopper, "is_hopper", lambda: False)
    assert forward() == "attention_forward"
    monkeypatch.setenv(cuda_hopper.VARIABLE, "wgmma")
    with pytest.raises(TinyllmError, match="'wgmma' is not one of mma, hopper"):
        forward()


FAULTY = [  # several blocks of keys in a pipeline of two stages; a window and documents
    Case(1, 1, 1, 430, 64, 64, hopper=True),
    Case(1, 4, 2, 250, 64, 64, hopper=True, documents=True, window=90),
]
FAULTY[1].document_ids = torch.bucketize(torch.arange(250), torch.tensor([32, 104, 210]))[None]
WIDE = [Case(1, 1, 1, 130, 128, 128, hopper=True)]
FAULTS = [
    pytest.param(
        mutant, id=mutant.fault, marks=() if mutant in hopper_mutants.QUICK else pytest.mark.slow
    )
    for mutant in hopper_mutants.QUICK + hopper_mutants.MORE
]
"""A program for each takes 2 s to compile: one fault of each kind runs every time."""


def noticed(mutant, cases):
    """Return what gives the fault away, None if nothing does."""
    for case in cases:
        for seed in SEEDS:
            try:
                o, lse = next(case.run(seed, ((mutant.file, mutant.old, mutant.new),)))
            except emulator.EmulatorError as error:
                return str(error)
            if case.failures([o], NAMES[:1]):
                return "wrong output"
            if not torch.allclose(lse.double(), case.exact_lse, rtol=1e-4, atol=1e-5):
                return "wrong lse"
    return None


def test_no_fault_is_seen_where_there_is_none():
    none = Mutant("none", hopper_mutants.FORWARD, "64 rows from", "sixty-four rows from")
    assert noticed(none, FAULTY + WIDE) is None


@pytest.mark.parametrize("mutant", FAULTS)
def test_a_fault_is_noticed(mutant):
    found = noticed(mutant, WIDE if mutant in hopper_mutants.WIDE else FAULTY)
    assert found, "no shape and no order of the warps gives it away"
    assert "error:" not in found, "it does not compile"
