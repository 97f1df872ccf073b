"""A whole quantised transformer in one native call, against the same model written down in fp64."""

import math
import os
import threading

import pytest
import torch
from instruction_sets import isa_fixture

from tinyllm.ops import cpu
from tinyllm.ops.decoder import Decoder, DecoderWeights, LayerWeights
from tinyllm.ops.int4 import dequantize_groups, quantize_groups
from tinyllm.ops.reference import hadamard, quantize_per_row
from tinyllm.ops.room import Room

EPS, V = 1e-6, 70


isa = isa_fixture(*cpu.ISAS)


@pytest.fixture
def native():
    if cpu.load()[0] is None:
        pytest.skip(f"no native kernels here: {cpu.load()[1]}")


def weights(
    *,
    d=24,
    n_heads=4,
    n_kv_heads=2,
    d_head=6,
    d_ff=40,
    qk_norm=True,
    window=0,
    seed=0,
    bits=8,
    activation_bits=8,
):
    generator = torch.Generator().manual_seed(seed)

    def matrix(n, k, bits=bits):
        quantize = quantize_groups if bits == 4 else quantize_per_row
        return quantize(torch.randn(n, k, generator=generator) / math.sqrt(k))

    def norm(n):
        return 0.5 + torch.rand(n, generator=generator)

    def layer():
        return LayerWeights(
            qkv=matrix((n_heads + 2 * n_kv_heads) * d_head, d),
            o=matrix(d, n_heads * d_head),
            gate=matrix(d_ff, d),
            up=matrix(d_ff, d),
            down=matrix(d, d_ff),
            norm_attention=norm(d),
            norm_mlp=norm(d),
            norm_q=norm(d_head) if qk_norm else None,
            norm_k=norm(d_head) if qk_norm else None,
            window=window,
        )

    angles = torch.rand(300, d_head // 2, generator=generator) * 6
    return DecoderWeights(
        layers=[layer() for _ in range(2)],
        embedding=quantize_per_row(torch.randn(V, d, generator=generator)),
        head=matrix(V, d, 8),
        norm=norm(d),
        cosines=angles.cos(),
        sines=angles.sin(),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        eps=EPS,
        activation_bits=activation_bits,
    )


def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def linear(w, x, weight):
    """Inputs rounded as ours are, everything else exact."""
    x = x.float()
    q, scale = quantize_per_row(x)
    rounded = q.double() * scale[..., None].double()
    if w.activation_bits == 16:
        q, scale = quantize_per_row(x - q * scale[..., None])
        rounded += q.double() * scale[..., None].double()
    if weight[0].dtype is torch.uint8:
        return rounded @ dequantize_groups(*weight).double().T
    return rounded @ (weight[0].double() * weight[1].double()[:, None]).T


def dequantized(room, layer, n):
    """What an INT8 room holds of the first sequence, keys and values (T, G, K)."""
    pairs = zip((room.keys, room.values), room.scales, strict=True)
    rows = [(q[layer, 0].double() * s[layer, 0, ..., None].double())[:, :n] for q, s in pairs]
    return [x.transpose(0, 1) for x in rows]


def attention_by_hand(w, layer, qkv, stored, kept):
    (T, _), K = qkv.shape, w.d_head
    heads = qkv.view(T, -1, K)
    q, k, v = heads.split([w.n_heads, w.n_kv_heads, w.n_kv_heads], dim=1)
    if layer.norm_q is not None:
        q, k = rms_norm(q, layer.norm_q), rms_norm(k, layer.norm_k)
    cos, sin = (x[:T, None].double() for x in (w.cosines, w.sines))

    def turned(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    q = turned(q)
    k, v = kept or (turned(k).to(stored).double(), v.to(stored).double())
    k, v = (x.repeat_interleave(w.n_heads // w.n_kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("thk,shk->hts", q, k) / math.sqrt(K)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    seen = (distance >= 0) & ((distance < layer.window) if layer.window else True)
    weighed = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("hts,shk->thk", weighed, v).flatten(1)


def by_hand(w, ids, stored, cache):
    """Hidden states and logits of one sequence.

    From an INT8 cache come the numbers that it holds: fp64 may round one to another step.
    """
    x = w.embedding[0][ids].double() * w.embedding[1][ids, None].double()
    for i, layer in enumerate(w.layers):
        kept = None if cache.scales is None else dequantized(cache, i, len(ids))
        qkv = linear(w, rms_norm(x, layer.norm_attention), layer.qkv)
        x = x + linear(w, attention_by_hand(w, layer, qkv, stored, kept), layer.o)
        normed = rms_norm(x, layer.norm_mlp)
        gate, up = linear(w, normed, layer.gate), linear(w, normed, layer.up)
        x = x + linear(w, hadamard(torch.nn.functional.silu(gate) * up), layer.down)
    hidden = rms_norm(x, w.norm)
    return hidden, linear(w, hidden, w.head)


def room(w, n_sequences=1, starts=None, dtype=torch.float32, length=300):
    """What is not written yet is NaN: numbers, or the scales of INT8."""
    shape, scales = (len(w.layers), n_sequences, w.n_kv_heads, length, w.d_head), None
    unset = 99 if dtype is torch.int8 else math.nan
    keys, values = (torch.full(shape, unset, dtype=dtype) for _ in range(2))
    if dtype is torch.int8:
        scales = torch.full(shape[:-1], math.nan), torch.full(shape[:-1], math.nan)
    return Room(keys=keys, values=values, scales=scales, starts=starts or [0] * n_sequences)


def row_of(room, row, start):
    """One sequence's part of a room."""
    keys, values, *scales = (
        x[:, row : row + 1] for x in (room.keys, room.values, *(room.scales or ()))
    )
    return Room(keys=keys, values=values, scales=tuple(scales) or None, starts=[start])


def tokens(*shape, seed=3):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


FORMATS = pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.int8])
# The seeds are of models whose keys and values round to the same bf16 in fp32 as in fp64: one that
# lies between two is off by 2^-8 of itself; second terms that round otherwise make that likelier.
CASES = [
    {},
    {"qk_norm": False, "d_head": 2, "d": 8, "n_kv_heads": 4},
    {"d_head": 32, "d": 96, "n_kv_heads": 1, "d_ff": 64, "seed": 1},
    {"d_head": 64, "d": 130, "n_heads": 3, "n_kv_heads": 3, "d_ff": 33},
    {"window": 5, "d_head": 42},
    {"bits": 4, "seed": 4},
    {"bits": 4, "d_head": 22, "d": 66, "n_heads": 3, "n_kv_heads": 3, "d_ff": 38, "seed": 4},
    {"activation_bits": 16, "seed": 2},
    {"activation_bits": 16, "bits": 4, "seed": 4},
]
BITS = pytest.mark.parametrize(
    "bits", [{}, {"bits": 4}, {"activation_bits": 16}], ids=["W8A8", "W4A8", "W8A16"]
)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@FORMATS
def test_equals_the_model_by_hand(isa, case, stored):
    w = weights(**case)
    ids = tokens(1, 37, seed=16)  # none of its activations lies between two steps of INT8
    decoder, cache = Decoder(w), room(w, dtype=stored)
    ours = decoder.hidden(ids, cache)[0]
    hidden, logits = by_hand(w, ids[0], stored, cache)
    # fp32 rounding; one activation that rounds to its other neighbour would be off by 1e-2
    close = {"rtol": 2e-4, "atol": 2e-4, "check_dtype": False}
    torch.testing.assert_close(ours, hidden, **close)
    last = decoder.logits(ids, room(w, dtype=stored))[0]
    torch.testing.assert_close(last, logits[-1], **close)


@BITS
@FORMATS
def test_parts_batches_and_threads_do_not_change_a_bit(native, monkeypatch, stored, bits):
    w = weights(d=64, d_head=16, d_ff=176, **bits)
    ids = tokens(3, 200)  # more rows than go through the layers together
    whole = Decoder(w).hidden(ids, room(w, 3, dtype=stored))
    for n_threads in ("1", "2", "3"):
        monkeypatch.setenv("TINYLLM_THREADS", n_threads)
        decoder = Decoder(w)
        for row in range(3):
            alone, parts = room(w, dtype=stored), []
            for start, end in ((0, 150), (150, 151), (151, 160), (160, 200)):
                at = row_of(alone, 0, start)
                parts.append(decoder.hidden(ids[row : row + 1, start:end], at))
            assert torch.equal(torch.cat(parts, dim=1)[0], whole[row])


@FORMATS
def test_sequences_of_different_lengths_go_together(native, stored):
    w = weights(d=64, d_head=16, d_ff=176)
    decoder, lengths, ids = Decoder(w), [7, 1, 100, 40], tokens(4, 102)
    together = room(w, 4, lengths, dtype=stored)
    expected = []
    for row, n in enumerate(lengths):
        decoder.hidden(ids[row : row + 1, :n], row_of(together, row, 0))
        expected.append(decoder.logits(ids[row : row + 1, : n + 1], room(w, dtype=stored)))
    next_ids = torch.stack([ids[row, n] for row, n in enumerate(lengths)])[:, None]
    assert torch.equal(decoder.logits(next_ids, together), torch.cat(expected))


@FORMATS
@BITS
@pytest.mark.parametrize("d_head", [24, 64])  # one that is compiled for, one that is not
def test_every_instruction_set_gives_the_same_bits(native, monkeypatch, stored, d_head, bits):
    w, ids, outputs = weights(d=96, d_head=d_head, d_ff=96, **bits), tokens(1, 60), []
    for number, name in enumerate(cpu.ISAS):
        if cpu.load()[0].tinyllm_isa_supported(number):
            monkeypatch.setenv("TINYLLM_CPU_ISA", name)
            cache = room(w, dtype=stored, length=60)
            hidden = Decoder(w).hidden(ids, cache)
            outputs.append((hidden, cache.keys, cache.values, *(cache.scales or ())))
    for others in outputs[1:]:
        assert all(torch.equal(*pair) for pair in zip(others, outputs[0], strict=True))


def test_int8_is_stored_by_the_rule_of_the_reference(isa):
    w, ids = weights(d_head=42), tokens(1, 37)
    plain, int8 = room(w, length=37), room(w, dtype=torch.int8, length=37)
    for cache in (plain, int8):
        Decoder(w).hidden(ids, cache)
    for exact, numbers, scales in zip(
        (plain.keys, plain.values), (int8.keys, int8.values), int8.scales, strict=True
    ):
        expected = quantize_per_row(exact[0])  # later blocks see what attention made of INT8
        assert torch.equal(numbers[0], expected[0])
        assert torch.equal(scales[0], expected[1])


def test_what_does_not_fit_is_refused(native):
    w = weights()
    decoder = Decoder(w)
    for bad in (-1, V):
        with pytest.raises(IndexError, match=f"one of {V}"):
            decoder.logits(torch.tensor([[1, bad]]), room(w))
    with pytest.raises(IndexError, match="11 positions"):
        decoder.logits(tokens(1, 3), room(w, starts=[8], length=10))
    with pytest.raises(IndexError, match="of 1 sequences"):
        decoder.logits(tokens(2, 3), room(w))


@FORMATS
def test_nan_stays_in_its_sequence(native, stored):
    w = weights()
    w.embedding[1][5] = math.nan
    logits = Decoder(w).logits(torch.tensor([[1, 2], [5, 2]]), room(w, 2, dtype=stored))
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


def test_callers_at_the_same_time_and_forked_ones_get_their_own_threads(native, monkeypatch):
    monkeypatch.setenv("TINYLLM_THREADS", "2")
    w, ids = weights(d=64, d_head=16, d_ff=176), tokens(1, 20)
    decoder = Decoder(w)
    expected = decoder.logits(ids, room(w))
    results = []

    def work():
        results.extend(torch.equal(decoder.logits(ids, room(w)), expected) for _ in range(20))

    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [True] * 60
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(decoder.logits(ids, room(w)), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
