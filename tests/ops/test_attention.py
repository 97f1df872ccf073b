import ctypes
import logging
import mmap

import pytest
import torch
from instruction_sets import isa_fixture
from torch.nn import functional as F

from tinyllm.ops import attention as attention_module
from tinyllm.ops import cpu, flash, library, reference
from tinyllm.ops.attention import attention

ARITHMETICS = ("avx2", "avx512vnni", "avx512bf16")
FORMATS = (torch.bfloat16, torch.float32)
# B, H, G, T, K, E, documents, window
SHAPES = [
    (2, 4, 2, 1, 16, 16, False, 0),
    (1, 2, 2, 5, 48, 48, False, 0),
    (2, 4, 2, 64, 32, 32, False, 0),
    (1, 4, 1, 67, 64, 64, False, 0),
    (1, 3, 3, 129, 80, 112, False, 0),
    (1, 4, 2, 190, 96, 64, True, 0),
    (1, 2, 1, 200, 128, 128, False, 30),
    (2, 2, 1, 193, 16, 32, True, 70),
    (1, 1, 1, 600, 32, 16, False, 0),
    (1, 1, 1, 600, 16, 16, True, 128),
]


isa = isa_fixture(*ARITHMETICS)


def problem(shape, dtype, seed=0):
    """q, k, v and the gradient of the output, as a model lays them out; document ids or None."""
    b, h, g, t, k, e, documents, _ = shape
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(b, t, heads, width, generator=generator).to(dtype).transpose(1, 2)
        for heads, width in ((h, k), (g, k), (g, e), (h, e))
    ]
    lengths = torch.rand(b, t, generator=generator) < 1 / 40
    return tensors, (lengths.cumsum(1) * 3 if documents else None)


def with_gradients(function, tensors, documents, window):
    q, k, v, d_o = tensors
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    o = function(*inputs, documents, window, q.shape[-1] ** -0.5)
    return [o, *torch.autograd.grad(o, inputs, d_o)]


def wrong(a, exact):
    """Largest and root mean square error, as shares of the exact numbers' mean square."""
    error = (a.detach().double() - exact.detach()).abs()
    size = exact.detach().square().mean().sqrt() + 1e-30
    return float(error.max() / size), float(error.square().mean().sqrt() / size)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_within_that_of_torch_in_the_same_format(isa, nan_memory, shape, dtype):
    """At most twice forward, three times for gradients (FlashAttention's rule), against fp64."""
    tensors, documents = problem(shape, dtype)
    exact = with_gradients(reference.attention, [x.double() for x in tensors], documents, shape[7])
    plain = with_gradients(reference.attention, tensors, documents, shape[7])
    fused = with_gradients(library.attention, tensors, documents, shape[7])
    ours = with_gradients(flash.attention, tensors, documents, shape[7])
    ulp = torch.finfo(dtype).eps
    for i, (result, right) in enumerate(zip(ours, exact, strict=True)):
        assert result.dtype == dtype
        times = 3 if i else 2
        for a, b, c in zip(
            wrong(result, right), wrong(plain[i], right), wrong(fused[i], right), strict=True
        ):
            if not i or shape[3] > 1:  # one token: the exact gradients of q and k are 0
                assert a <= times * max(b, c) + ulp, (i, a, b, c)
    if shape[3] == 1:
        assert max(x.abs().max() for x in ours[1:3]) < 1e-2 * ours[3].abs().max()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_log_sum_exp_is_natural(isa, dtype):
    (q, k, v, _), _ = problem((1, 2, 1, 70, 32, 32, False, 0), dtype)
    _, lse = flash.flash_attention(q, k, v, None, 0, 0.3)
    scores = 0.3 * q.double() @ k.double().mT
    expected = scores.masked_fill(~reference.visible(70, None, 0, q.device), -torch.inf)
    torch.testing.assert_close(lse.double(), expected.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_heads_share_keys_as_hugging_face_maps_them(isa):
    (q, k, v, _), _ = problem((1, 4, 2, 33, 16, 16, False, 0), torch.float32)
    y = attention(q, k, v)
    for head, group in enumerate([0, 0, 1, 1]):
        alone = attention(*(x[:, i : i + 1] for x, i in ((q, head), (k, group), (v, group))))
        assert torch.equal(y[:, head : head + 1], alone)


def test_threads_and_repetition_do_not_change_a_bit(isa, monkeypatch):
    tensors, documents = problem((3, 4, 2, 150, 32, 32, True, 0), torch.bfloat16)
    results = []
    for threads in ("1", "2", "3", "2"):
        monkeypatch.setenv("TINYLLM_THREADS", threads)
        results.append(with_gradients(flash.attention, tensors, documents, 0))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_what_is_invisible_has_no_influence_at_all(isa, dtype):
    """Nothing passes from the future, from outside the window or from another document."""
    shape = (1, 2, 1, 150, 32, 32, False, 20)
    (q, k, v, d_o), _ = problem(shape, dtype)
    documents = (torch.arange(150) >= 100).long()[None]
    clean = attention(q, k, v, document_ids=documents, window=20)
    k2, v2 = k.clone(), v.clone()
    for x in (k2, v2):
        x[:, :, 60:] = 9e9  # the future of 40 .. 59
        x[:, :, :20] = -9e9  # beyond the window of these
    spoilt = attention(q, k2, v2, document_ids=documents, window=20)
    assert torch.equal(spoilt[:, :, 40:60], clean[:, :, 40:60])
    k2, v2 = k.clone(), v.clone()
    k2[:, :, :100] = v2[:, :, :100] = 9e9
    spoilt = attention(q, k2, v2, document_ids=documents, window=20)
    assert torch.equal(spoilt[:, :, 100:], clean[:, :, 100:])
    inputs = [q, k, v.detach().requires_grad_()]
    y = attention(*inputs, document_ids=documents)
    (d_v,) = torch.autograd.grad(y[:, :, 100:], inputs[2], d_o[:, :, 100:])
    assert (d_v[:, :, :100] == 0).all()
    assert (d_v[:, :, 100:] != 0).all()


def test_memory_left_by_an_earlier_call_does_not_matter(isa):
    shape = (1, 2, 1, 130, 64, 64, False, 0)
    tensors, _ = problem(shape, torch.bfloat16)
    before = with_gradients(flash.attention, tensors, None, 0)
    nan = [
        torch.full_like(x, torch.nan)
        for x in problem((2, 2, 2, 300, 128, 128, False, 0), torch.bfloat16)[0]
    ]
    assert all(x.isnan().all() for x in with_gradients(flash.attention, nan, None, 0))
    after = with_gradients(flash.attention, tensors, None, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_huge_scores_stay_finite(isa):
    (q, k, v, d_o), _ = problem((1, 2, 1, 90, 32, 32, False, 0), torch.float32)
    results = with_gradients(flash.attention, [q * 300, k * 300, v, d_o], None, 0)
    exact = with_gradients(
        reference.attention, [x.double() for x in (q * 300, k * 300, v, d_o)], None, 0
    )
    assert all(x.isfinite().all() for x in results)
    # Scores reach 3e5, where one rounding of fp32 is 0.03: an error of a few of these in a weight.
    assert wrong(results[0], exact[0])[1] < 0.05


def guarded(x, at_end):
    """A copy that touches an unreadable page: before its first or after its last byte."""
    page = mmap.PAGESIZE
    size = x.numel() * x.element_size()
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + page + room):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), page, 0) == 0
    offset = page + (room - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset)
    return copy.view(x.shape).copy_(x)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
def test_nothing_outside_the_tensors_is_read(isa, at_end, dtype):
    tensors, documents = problem((1, 2, 1, 37, 48, 16, True, 0), dtype)
    documents = documents.int()
    q, k, v, d_o = (guarded(x.contiguous(), at_end) for x in tensors)
    documents = guarded(documents, at_end)
    o, lse = flash.flash_attention(q, k, v, documents, 0, 0.1)
    o, lse = guarded(o.contiguous(), at_end), guarded(lse, at_end)
    flash.flash_attention_backward(d_o, q, k, v, o, lse, documents, 0, 0.1)


def test_other_layouts_are_understood(isa):
    (q, k, v, d_o), _ = problem((2, 4, 2, 40, 32, 32, False, 0), torch.bfloat16)
    right = with_gradients(flash.attention, (q, k, v, d_o), None, 0)
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v, d_o)]
    o = flash.flash_attention(*turned[:3], None, 0, 32**-0.5)
    gradients = flash.flash_attention_backward(turned[3], *turned[:3], *o, None, 0, 32**-0.5)
    for a, b in zip((o[0], *gradients), right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_torch_knows_the_operator(dtype):
    if cpu.load()[0] is None:
        pytest.skip("no native kernels here")
    (q, k, v, _), documents = problem((2, 4, 2, 20, 16, 32, True, 0), dtype)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    arguments = (q, k, v, documents.int(), 7, 0.25)
    assert set(torch.library.opcheck(flash.flash_attention, arguments).values()) == {"SUCCESS"}


def test_the_compiler_takes_it_whole():
    if cpu.load()[0] is None:
        pytest.skip("no native kernels here")
    (q, k, v, d_o), _ = problem((1, 2, 1, 20, 16, 16, False, 0), torch.bfloat16)

    def through(*inputs):
        return attention(*inputs[:3])

    eager = with_gradients(through, (q, k, v, d_o), None, 0)
    whole = torch.compile(through, fullgraph=True, backend="aot_eager")
    for a, b in zip(with_gradients(whole, (q, k, v, d_o), None, 0), eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_every_backend_agrees_in_fp64(monkeypatch, backend):
    monkeypatch.setenv("TINYLLM_KERNELS", backend)
    (q, k, v, _), documents = problem((2, 4, 2, 30, 16, 32, True, 9), torch.float64)
    k_all, v_all = (x.repeat_interleave(2, dim=1) for x in (k, v))
    mask = reference.visible(30, documents, 9, q.device)
    right = F.scaled_dot_product_attention(q, k_all, v_all, attn_mask=mask, scale=0.2)
    y = attention(q, k, v, document_ids=documents, window=9, scale=0.2)
    torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_reference_are_right():
    (q, k, v, _), documents = problem((1, 2, 1, 9, 16, 16, True, 0), torch.float64)
    inputs = [x.detach()[..., :3].contiguous().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda *x: reference.attention(*x, documents, 4, 0.3), inputs, fast_mode=True
    )


@pytest.mark.parametrize(("dtype", "width"), [(torch.float16, 16), (torch.bfloat16, 24)], ids=str)
def test_what_the_kernel_cannot_do_goes_to_torch_and_is_told_once(dtype, width, caplog):
    attention_module._say_once.cache_clear()
    (q, k, v, _), _ = problem((1, 2, 1, 10, width, 16, False, 0), dtype)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            y = attention(q, k, v)
    assert torch.equal(y, library.attention(q, k, v, None, 0, width**-0.5))
    (line,) = caplog.records
    assert line.getMessage().startswith("attention runs on torch: ")


def test_unfit_tensors_are_refused():
    q, k = torch.zeros(1, 3, 4, 16), torch.zeros(1, 2, 4, 16)
    with pytest.raises(ValueError, match=r"do not fit together: \(1, 3, 4, 16\)"):
        attention(q, k, k)
