import functools

import emulator
import pytest
import torch
from attention_case import Case

from tinyllm.ops import cuda_attention, reference

pytestmark = pytest.mark.usefixtures("poisoned")

SEEDS = (0, 1, 2)
CASES = [
    Case(2, 4, 2, 1, 32, 32),
    Case(1, 2, 1, 130, 64, 64),
    Case(1, 4, 2, 67, 64, 64, dtype=torch.float16),
    Case(2, 2, 1, 150, 64, 64, documents=True, window=40),
    Case(1, 2, 2, 123, 96, 64, documents=True),
    Case(1, 1, 1, 97, 128, 128, window=30),
    Case(1, 2, 1, 42, 48, 80),
]
MANY = [
    *(
        Case(2, 4, 2, 193, w, w, dtype=d)
        for w in range(16, 129, 16)
        for d in cuda_attention.FORMATS
    ),
    *(
        Case(1, 2, 1, 200, w, e, documents=True)
        for w, e in ((96, 64), (48, 32), (64, 128), (16, 112))
    ),
    *(
        Case(1, 2, 1, 431, 64, 64, documents=d, window=w)
        for d in (False, True)
        for w in (1, 33, 128)
    ),
    Case(1, 1, 1, 600, 32, 32, documents=True),
    Case(1, 2, 1, 190, 64, 64, size=30.0),
]


def check(case):
    first = None
    for seed in SEEDS:
        (o, lse), gradients = case.run(seed)
        results = [o, *gradients, lse]
        assert case.failures(results[:4]) == [] or case.t == 1
        first = first or results
        for a, b in zip(results, first, strict=True):
            assert torch.equal(a, b), "the order of warps changes a bit"
    return first


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_within_that_of_torch_in_the_same_format(case):
    results = check(case)
    assert all(x.dtype == case.dtype for x in results[:4])
    if case.t == 1:  # the exact gradients of q and k are 0
        assert max(x.abs().max() for x in results[1:3]) < 1e-2 * results[3].abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_every_width_document_and_window(case):
    check(case)


def test_tiles_of_roomy_cards(monkeypatch):
    monkeypatch.setattr(cuda_attention, "is_roomy", lambda device: True)
    check(Case(1, 2, 1, 150, 128, 128))


def test_log_sum_exp_is_natural():
    case = Case(1, 2, 1, 130, 64, 64)
    q, k, v, _ = case.tensors
    _, lse = cuda_attention.forward(emulator.run, q, k, v, None, 0, 0.3)
    scores = 0.3 * q.double() @ k.double().mT
    expected = scores.masked_fill(~reference.visible(130, None, 0, q.device), -torch.inf)
    torch.testing.assert_close(lse.double(), expected.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_heads_share_keys_as_hugging_face_maps_them():
    q, k, v, _ = Case(1, 4, 2, 33, 64, 64).tensors
    run = functools.partial(cuda_attention.forward, emulator.run)
    o, _ = run(q, k, v, None, 0, 0.125)
    for head, group in enumerate([0, 0, 1, 1]):
        alone, _ = run(
            q[:, head : head + 1], *(x[:, group : group + 1] for x in (k, v)), None, 0, 0.125
        )
        assert torch.equal(o[:, head : head + 1], alone)


def test_documents_need_not_be_in_order():
    """Only equality of ids counts; blocks are skipped by the ids' ranges."""
    case = Case(1, 1, 1, 150, 64, 64, documents=True)
    case.document_ids = torch.tensor([5, -2, 5, 9]).repeat_interleave(
        torch.tensor([40, 30, 50, 30])
    )[None]
    check(case)


def test_what_is_invisible_has_no_influence_at_all():
    """Nothing passes from the future, from outside the window or from another document."""
    q, k, v, _ = Case(1, 2, 1, 150, 64, 64).tensors
    documents = (torch.arange(150) >= 100).long()[None]
    run = functools.partial(cuda_attention.forward, emulator.run)
    clean, _ = run(q, k, v, documents, 20, 0.125)
    spoilt_k, spoilt_v = k.clone(), v.clone()
    for x in (spoilt_k, spoilt_v):
        x[:, :, 60:] = 9e9  # the future of 40 .. 59
        x[:, :, :20] = -9e9  # beyond the window of these
    assert torch.equal(
        run(q, spoilt_k, spoilt_v, documents, 20, 0.125)[0][:, :, 40:60], clean[:, :, 40:60]
    )
    spoilt_k, spoilt_v = k.clone(), v.clone()
    spoilt_k[:, :, :100] = spoilt_v[:, :, :100] = 9e9
    assert torch.equal(
        run(q, spoilt_k, spoilt_v, documents, 20, 0.125)[0][:, :, 100:], clean[:, :, 100:]
    )


def test_unaligned_tensors_are_copied():
    case = Case(1, 2, 1, 70, 64, 64)
    shifted = [
        torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
        for x in case.tensors[:3]
    ]
    assert shifted[0].data_ptr() % 16
    o, _ = cuda_attention.forward(emulator.run, *shifted, None, 0, case.scale)
    assert torch.equal(o, next(case.run(0))[0])


def test_refusals_say_why():
    assert cuda_attention.refuses(torch.bfloat16, 64, 96) is None
    assert "float32" in cuda_attention.refuses(torch.float32, 64, 64)
    assert "values have 40" in cuda_attention.refuses(torch.float16, 64, 40)
    assert "heads have 144" in cuda_attention.refuses(torch.float16, 144, 64)
    q, k, v, _ = Case(1, 4, 2, 5, 32, 32).tensors
    with pytest.raises(ValueError, match="do not fit together"):
        cuda_attention.forward(emulator.run, q[:, :3], k, v, None, 0, 1.0)
    with pytest.raises(ValueError, match="one number format"):
        cuda_attention.forward(emulator.run, q, k, v.half(), None, 0, 1.0)
    with pytest.raises(ValueError, match="document_ids"):
        cuda_attention.forward(emulator.run, q, k, v, torch.zeros(1, 4), 0, 1.0)
