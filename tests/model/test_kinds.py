"""Every kind of block against formulas in fp64, and cached decoding of each against one pass."""

import dataclasses

import pytest
import torch
from test_model import shipped
from tiny_lm import VOCAB, tiny_config, tiny_model

from tinyllm.artifact import build_artifact
from tinyllm.errors import DataError, ParamsError
from tinyllm.inference.cache import KVCache
from tinyllm.model.attention import causal_mask, window_mask
from tinyllm.model.directory import load_config, load_model, save_model
from tinyllm.model.ffn import MLP
from tinyllm.model.norm import LayerNorm, RMSNorm, fp16_safe_rms_norm, make_fp16_safe
from tinyllm.model.rope import rope_tables, yarn_temperature
from tinyllm.model.sizes import MlaSizes, RopeScaling, resolve
from tinyllm.params import build_params, to_plain
from tinyllm.quantization.int8 import quantize_model

MLA = MlaSizes(q_rank=None, kv_rank=24, d_nope=8, d_rope=4, d_v=12)
YARN = RopeScaling(kind="yarn", factor=4.0, original_len=12)
KINDS = {
    "multi-head": {"n_kv_heads": 4},
    "multi-query": {"n_kv_heads": 1},
    "latent": {"mla": MLA, "d_head": 12, "qk_norm": False, "n_kv_heads": 4},
    "latent, low-rank query, window, yarn": {
        **{"mla": dataclasses.replace(MLA, q_rank=16), "d_head": 12, "qk_norm": False},
        **{"n_kv_heads": 4, "window": 5, "window_layers": (1,), "rope_scaling": YARN},
    },
    "window": {"window": 5, "window_layers": (0,)},
    "gpt-2": {
        **{"norm": "layernorm", "ffn": "gelu", "bias": True, "positions": "learned"},
        **{"n_kv_heads": 4, "qk_norm": False, "tie_embeddings": True},
    },
    "relu2, linear scaling": {
        "ffn": "relu2",
        "rope_scaling": RopeScaling(kind="linear", factor=2.0, original_len=24),
    },
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def ids_of(rows, tokens):
    return torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
@kinds
@pytest.mark.parametrize("chunks", [[1] * 24, [24], [10] + [1] * 14, [7, 9, 8]])
def test_cached_decode_equals_full_forward(kind, chunks):
    model, ids = tiny_model(**kind), ids_of(2, 24)
    full = model(ids)
    cache = KVCache(model.config, 2, 24, torch.float32, "cpu")
    cached = torch.cat([model(part, cache=cache) for part in ids.split(chunks, dim=1)], dim=1)
    stored = sum(t.numbers.numel() * 4 for layer in cache.layers for t in layer.memory)
    assert stored == KVCache.n_bytes(model.config, 2, 24, torch.float32)
    exact = model.double()(ids)
    # the full pass's own rounding, measured against fp64, is the yardstick
    tolerance = 2 * (full - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (cached - exact).abs().max() <= 2 * tolerance


@kinds
def test_packed_documents_are_as_if_alone(kind):
    model, ids = tiny_model(**kind), ids_of(1, 20)
    with torch.no_grad():
        packed = model(ids, document_ids=torch.tensor([[4] * 7 + [2] * 13]))
        torch.testing.assert_close(packed[:, 7:], model(ids[:, 7:]), atol=2e-5, rtol=0)


@kinds
@pytest.mark.parametrize("d_head", [None, 16], ids=["", "heads of 16"])  # 16: our kernel's
def test_training_sees_what_evaluation_sees(kind, d_head):
    if d_head is not None:
        wide = (
            {"mla": dataclasses.replace(MLA, d_nope=8, d_rope=8, d_v=16)} if "mla" in kind else {}
        )
        kind = {**kind, **wide, "d_head": d_head}
    model, ids = tiny_model(**kind), ids_of(2, 20)
    documents = torch.tensor([[4] * 7 + [2] * 13, [1] * 20])
    with torch.no_grad():
        for packed in (None, documents):
            evaluated = model.eval()(ids, document_ids=packed)
            trained = model.train()(ids, document_ids=packed)
            torch.testing.assert_close(trained, evaluated, atol=2e-5, rtol=0)


@kinds
def test_a_directory_keeps_the_kind(tmp_path, kind):
    model, ids = tiny_model(**kind), ids_of(1, 12)
    with build_artifact(tmp_path / "m", kind="pretrain", made_from=[]) as draft:
        save_model(model, draft.path)
    assert load_config(tmp_path / "m")[0] == model.config
    assert torch.equal(load_model(tmp_path / "m")(ids), model(ids))


@kinds
def test_int8_follows_the_float_model_or_refuses(kind):
    model, ids = tiny_model(**kind), ids_of(1, 24)
    if model.config.bias:
        with pytest.raises(DataError, match=r"^quantize: .*model\.bias: false$"):
            quantize_model(model)
        return
    with torch.inference_mode():
        full, cache = model(ids), KVCache(model.config, 1, 24, torch.float32, "cpu")
        int8 = quantize_model(model)
        cached = torch.cat([int8(part, cache=cache) for part in ids.split(1, dim=1)], dim=1)
    assert (cached - full).norm() < 0.1 * full.norm()  # 14 matrices of 1/254 each, and activations


def test_the_window_is_the_last_keys_that_are_seen():
    i, j = torch.arange(9)[:, None], torch.arange(9)
    assert torch.equal(window_mask(causal_mask(9, "cpu"), 3), (j <= i) & (i - j < 3))
    padded = torch.tensor([[[False, True, True, False, True, False]]])
    assert window_mask(padded, 2).tolist() == [[[False, False, True, False, True, False]]]


def test_what_lies_before_the_window_has_no_effect():
    model = tiny_model(n_layers=1, window=4, window_layers=(0,))
    ids = ids_of(1, 12)
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % VOCAB
    with torch.no_grad():
        same = (model(ids) == model(other)).all(-1)[0]
    assert same.tolist() == [True] * 5 + [False] * 4 + [True] * 3


@pytest.mark.parametrize("bias", [False, True])
def test_layernorm_equals_fp64(bias):
    norm, x = LayerNorm(96, 1e-5, bias=bias), torch.randn(7, 96) * 50 + 20
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    z = x.double()
    exact = (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    exact = exact * norm.weight.double() + (norm.bias.double() if bias else 0)
    # fp32: the mean cancels against values of up to 200, two roundings of 6e-8 each
    torch.testing.assert_close(norm(x).double(), exact, atol=200 / 50 * 4 * 6e-8 * 3, rtol=4e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0, 1.5e4])
def test_fp16_safe_norm_survives_where_squares_overflow(scale):
    x = torch.randn(64, 768, generator=torch.Generator().manual_seed(0)) * scale
    x = x.clamp(-6e4, 6e4).half()
    weight = torch.linspace(0.5, 2, 768)
    z = x.double()
    exact = z * (z.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    ours = fp16_safe_rms_norm(x, weight, 1e-5).double()
    # five fp16 roundings of 2^-11, and four of 2^-25 where squares, mean and eps are subnormal: the
    # root halves those
    tolerance = 5 * 2**-11 + 2 * 2**-25 / (z.square().mean() + 1e-5)
    assert ((ours - exact).abs() / exact.abs().clamp(min=2**-6)).max() < tolerance
    unsafe = x * (x * x).mean(-1, keepdim=True).add(1e-5).rsqrt() * weight.half()
    if scale > 256:
        assert unsafe.abs().max() == 0  # what a plain fp16 norm makes of it
    assert fp16_safe_rms_norm(torch.zeros(1, 8).half(), weight[:8], 1e-5).eq(0).all()


def test_fp16_safe_is_switched_on_for_a_whole_model():
    model, ids = tiny_model(), ids_of(1, 12)
    full = model(ids)
    safe = make_fp16_safe(model)
    assert sum(isinstance(m, RMSNorm) and m.fp16_safe for m in safe.modules()) == 2 * 4 + 1
    torch.testing.assert_close(safe(ids), full, atol=2e-5, rtol=0)
    assert safe.half()(ids).isfinite().all()


def test_relu2_is_the_square_of_what_is_positive():
    mlp = MLP(tiny_config(ffn="relu2")).double()
    x = torch.randn(5, 32, dtype=torch.float64)
    expected = (x @ mlp.up_proj.weight.T).clamp(min=0) ** 2 @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize(("kind", "factor"), [("linear", 8.0), ("yarn", 8.0), ("yarn", 2.5)])
def test_scaled_angles_equal_transformers(kind, factor):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = RopeScaling(kind=kind, factor=factor, original_len=256)
    theirs = {"rope_type": kind, "rope_theta": 1e4, "factor": factor}
    theirs |= {"original_max_position_embeddings": 256} if kind == "yarn" else {}
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=theirs)
    config.max_position_embeddings = 2048
    assert kind in ROPE_INIT_FUNCTIONS
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(600)[None])
    ours = [t * yarn_temperature(scaling) for t in rope_tables(600, 64, 1e4, scaling)]
    for ours_t, theirs_t in zip(ours, (cos, sin), strict=True):
        # they multiply 600 by the frequency in fp32: angles off by 600 * 2^-24, twice
        torch.testing.assert_close(ours_t, theirs_t[0, :, :32], atol=2 * 600 * 2**-24, rtol=0)


def test_dropout_is_for_training_only_and_zero_draws_nothing():
    ids = ids_of(1, 12)
    model = tiny_model().train()
    state = torch.random.get_rng_state()
    assert torch.equal(model(ids), model.eval()(ids))
    assert torch.equal(torch.random.get_rng_state(), state)
    dropped = tiny_model(dropout=0.5)
    assert torch.equal(dropped(ids), model(ids))
    assert not torch.equal(dropped.train()(ids), model(ids))


@pytest.mark.parametrize("d", [64, 128, 320, 768, 1024])
def test_mla_alone_gives_a_valid_model_with_a_quarter_of_the_cache(d):
    n_heads = max(2, d // 64)
    latent = resolve(shipped(d=d, n_heads=n_heads, attention="mla"), vocab_size=300)
    full = resolve(shipped(d=d, n_heads=n_heads, n_kv_heads=n_heads), vocab_size=300)
    sizes = [KVCache.n_bytes(config, 1, 1, torch.float32) for config in (latent, full)]
    assert 4 * sizes[0] <= sizes[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "mla", "bias": True}, "model.bias: mla has none"),
        ({"attention": "mla", "positions": "learned"}, "model.positions: mla needs rope"),
        ({"mla": {"d_rope": 5}}, "model.mla.d_rope: 5 is odd"),
        ({"mla": {"kv_rank": 0}}, "model.mla.kv_rank: must be at least 1"),
        ({"window": 0}, "model.window: must be at least 1"),
        ({"window_layers": [1]}, "model.window_layers: without effect"),
        ({"window": 8, "window_layers": [6]}, "model.window_layers: there is no block 6 of 6"),
        ({"dropout": 1.0}, "model.dropout: must be at least 0 and below 1"),
        ({"rope_scaling": {"kind": "yarn"}}, "model.rope_scaling.factor: 1.0 with kind yarn"),
        ({"rope_scaling": {"factor": 2.0}}, "model.rope_scaling.factor: 2.0 with kind none"),
        ({"ffn": "swishglu"}, "model.ffn: 'swishglu' is not one of swiglu.*did you mean swiglu"),
    ],
)
def test_impossible_kinds_are_named(changes, message):
    from test_model import Shipped

    values = to_plain(shipped())
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    with pytest.raises(ParamsError, match=message):
        build_params(Shipped, {"model": values}, "params.yaml")
