import math

import pytest
import torch
from instruction_sets import isa_fixture

from tinyllm.ops import cpu
from tinyllm.ops.decode import BlockWeights, DecodeBlock

H, G = 4, 2
EPS = 1e-6


isa = isa_fixture(*cpu.ISAS)


def copying(n, k):
    """A layer whose outputs are its first inputs, rounded to INT8: the identity, or part of it."""
    weight_q = torch.zeros(n, k, dtype=torch.int8)
    weight_q.diagonal().fill_(127)
    return weight_q, torch.full((n,), 1 / 127)


def silent(n, k):
    return torch.zeros(n, k, dtype=torch.int8), torch.zeros(n)


def block(d, d_head, **changes):
    n_qkv = (H + 2 * G) * d_head
    parts = {
        "qkv": copying(n_qkv, d),
        "o": copying(d, H * d_head),
        "gate_up": silent(2 * 2 * d, d),
        "down": silent(d, 2 * d),
        "norm_attention": torch.linspace(0.5, 2, d),
        "norm_mlp": torch.ones(d),
        "norm_q": None,
        "norm_k": None,
    }
    sizes = {"n_heads": H, "n_kv_heads": G, "d_head": d_head, "eps": EPS}
    return DecodeBlock(BlockWeights(**{**parts, **changes}, **sizes))


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def rms_norm(x, weight):
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def step(x):
    """Half of the INT8 step of a row: the largest rounding error, and some for fp32."""
    return x.abs().max().item() / 127 * (0.5 + 1e-3)


@pytest.mark.parametrize("d_head", [2, 6, 32, 64])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_projection_is_norm_then_rotation(isa, d_head, qk_norm):
    d = (H + 2 * G) * d_head
    weight_q, weight_k = torch.linspace(1, 2, d_head), torch.linspace(2, 1, d_head)
    norms = {"norm_q": weight_q, "norm_k": weight_k} if qk_norm else {}
    fused, x = block(d, d_head, **norms), random(1, 1, d, scale=3)
    angles = torch.linspace(0.1, 3, d_head // 2)
    qkv, k, v = fused.project(x, angles.cos(), angles.sin())

    normed = rms_norm(x, torch.linspace(0.5, 2, d)).flatten()
    scale = normed.abs().max() / 127
    rounded = ((normed / scale).round() * scale).view(-1, d_head)
    heads = rounded.clone()
    if qk_norm:
        heads[:H], heads[H : H + G] = (
            rms_norm(rounded[:H], weight_q),
            rms_norm(rounded[H : H + G], weight_k),
        )
    a, b = heads.chunk(2, dim=-1)
    cos, sin = angles.double().cos(), angles.double().sin()
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    turned[H + G :] = heads[H + G :]
    torch.testing.assert_close(qkv.view(-1, d_head), turned.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(k[0, :, 0], qkv.view(-1, d_head)[H : H + G])
    assert torch.equal(v[0, :, 0], qkv.view(-1, d_head)[H + G :])


@pytest.mark.parametrize("n_keys", [1, 2, 15, 16, 17, 100])
@pytest.mark.parametrize(("d_head", "scale"), [(2, 1.0), (42, 1.0), (64, 1.0), (64, 30.0)])
def test_attention_is_within_one_rounding_of_fp64(isa, n_keys, d_head, scale):
    d = H * d_head
    fused = block(d, d_head)
    x, qkv = random(1, 1, d), random((H + 2 * G) * d_head, seed=1, scale=scale)
    cache = random(2, 1, G, n_keys + 3, d_head, seed=2, scale=scale)
    k, v = cache[0, :, :, :n_keys], cache[1, :, :, :n_keys]  # views of a larger cache
    y = fused.finish(x, qkv, k, v)

    q = qkv[: H * d_head].view(1, H, 1, d_head).double()
    keys, values = (t.double().repeat_interleave(H // G, dim=1) for t in (k, v))
    attended = torch.softmax(q @ keys.mT / math.sqrt(d_head), dim=-1) @ values
    error = (y - x).double().flatten() - attended.flatten()
    assert error.abs().max() <= step(attended) + 1e-6


def test_mlp_is_within_two_roundings_of_fp64(isa):
    d, d_ff = 48, 40
    fused = block(
        d,
        d // H,
        o=silent(d, d),
        gate_up=copying(2 * d_ff, d),
        down=copying(d, d_ff),
        norm_mlp=torch.full((d,), 20.0),
    )
    x, kv = random(1, 1, d), random(1, G, 1, d // H, seed=1)
    y = fused.finish(x, random((H + 2 * G) * d // H), kv, kv)
    normed = rms_norm(x, torch.full((d,), 20.0)).flatten()
    scale = normed.abs().max() / 127
    rounded = torch.zeros(2 * d_ff, dtype=torch.float64)
    rounded[:d] = (normed / scale).round() * scale  # gates reach -60 to 60, ups mostly 0
    hidden = torch.nn.functional.silu(rounded[:d_ff]) * rounded[d_ff:]
    expected = torch.zeros(d, dtype=torch.float64)
    expected[:d_ff] = hidden
    assert hidden.abs().max() > 1
    assert ((y - x).double().flatten() - expected).abs().max() <= step(hidden) + 1e-4


def test_every_instruction_set_gives_the_same_bits(monkeypatch):
    native, reason = cpu.load()
    if native is None:
        pytest.skip(f"no native kernels here: {reason}")
    d, d_head = 96, 24
    outputs = []
    for number, name in enumerate(cpu.ISAS):
        if not native.tinyllm_isa_supported(number):
            continue
        monkeypatch.setenv("TINYLLM_CPU_ISA", name)
        fused = block(
            d,
            d_head,
            gate_up=copying(4 * d, d),
            down=copying(d, 2 * d),
            norm_q=torch.ones(24),
            norm_k=torch.ones(24),
        )
        x, angles = random(1, 1, d), torch.linspace(0, 1, 12)
        qkv, k, v = fused.project(x, angles.cos(), angles.sin())
        keys = torch.cat([random(1, G, 50, d_head), k], dim=2)
        outputs.append((qkv, fused.finish(x, qkv, keys, keys * 2 + v)))
    for qkv, y in outputs[1:]:
        assert torch.equal(qkv, outputs[0][0])
        assert torch.equal(y, outputs[0][1])


def test_keys_in_another_layout_are_understood(isa):
    fused, x = block(32, 8), random(1, 1, 32)
    qkv, k = random(H * 16, seed=1), random(1, G, 8, 9, seed=2).mT  # K is not the last stride
    assert torch.equal(fused.finish(x, qkv, k, k), fused.finish(x, qkv, *[k.contiguous()] * 2))


def test_nan_goes_through(isa):
    fused, x = block(32, 8), random(1, 1, 32)
    kv = random(1, G, 3, 8)
    x[0, 0, 5] = math.nan
    assert fused.finish(x, random(64), kv, kv).isnan().any()
