import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tinyllm.artifact import build_artifact
from tinyllm.errors import ArtifactError, ParamsError
from tinyllm.model.attention import document_positions
from tinyllm.model.directory import load_model, save_model
from tinyllm.model.init import build_model, count_parameters
from tinyllm.model.norm import RMSNorm
from tinyllm.model.rope import apply_rope, rope_tables
from tinyllm.model.sizes import ModelParams, resolve, round_up
from tinyllm.model.transformer import next_token_loss
from tinyllm.params import build_params, load_params, to_plain

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True, kw_only=True, slots=True)
class Shipped:
    model: ModelParams


def shipped(**changes):
    params = load_params(Shipped, ROOT / "params.yaml").model
    return dataclasses.replace(params, **changes)


def tiny(**changes):
    return resolve(shipped(d=64, n_layers=2, n_heads=4, max_seq_len=32, **changes), vocab_size=50)


@pytest.mark.parametrize("d", [64, 128, 384, 512, 768, 1024])
def test_width_alone_gives_a_valid_model(d):
    config = resolve(shipped(d=d), vocab_size=300)
    assert config.d_head * config.n_heads == d
    assert config.n_heads % config.n_kv_heads == 0
    assert config.d_ff % 64 == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 5}, "model.n_heads: 5 does not divide d = 256"),
        ({"n_kv_heads": 3}, "model.n_kv_heads: 3 does not divide n_heads = 4"),
        ({"n_layers": 0}, "model.n_layers: must be at least 1, got 0"),
        ({"d": 255, "n_heads": 5}, "model.d: head width 51 is odd"),
        ({"rope_base": 1.0}, "model.rope_base: must be above 1"),
        ({"norm_eps": 0.0}, "model.norm_eps: must be above 0"),
    ],
)
def test_impossible_sizes_are_named(changes, message):
    values = {**to_plain(shipped()), **changes}
    with pytest.raises(ParamsError, match=message):
        build_params(Shipped, {"model": values}, "params.yaml")


def test_parameter_count_is_the_sum_of_its_parts():
    c = tiny(tie_embeddings=False)
    attention = 2 * c.d * c.d + 2 * c.d * c.n_kv_heads * c.d_head
    block = attention + 3 * c.d * c.d_ff + 2 * c.d + 2 * c.d_head
    assert count_parameters(build_model(c, 0)) == 2 * 50 * c.d + c.n_layers * block + c.d


def test_the_first_prediction_is_nearly_uniform():
    c = tiny(tie_embeddings=False)
    ids = torch.randint(0, 50, (4, 32))
    loss = next_token_loss(build_model(c, 0)(ids), ids) / ids.numel()
    assert loss.item() == pytest.approx(math.log(50), abs=1e-5)


def test_the_same_seed_gives_the_same_weights():
    first, second = build_model(tiny(), 5).state_dict(), build_model(tiny(), 5).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(
        first["embed_tokens.weight"], build_model(tiny(), 6).state_dict()["embed_tokens.weight"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_rmsnorm_equals_fp64_to_the_dtype(dtype, scale):
    torch.manual_seed(0)
    norm = RMSNorm(96, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = (torch.randn(7, 96) * scale).to(dtype)
    exact = (
        x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    )
    # one rounding to the dtype, and fp32 arithmetic before it
    least = torch.finfo(dtype).smallest_normal  # below it rounding is absolute
    error = (norm(x).double() - exact).abs() / exact.abs().clamp(min=least)
    assert error.max() <= torch.finfo(dtype).eps + 1e-6


def test_rope_turns_by_the_relative_position_only():
    cos, sin = rope_tables(64, 16, 1e4)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(i, j):
        return (
            apply_rope(q, cos[i : i + 1], sin[i : i + 1])
            * apply_rope(k, cos[j : j + 1], sin[j : j + 1])
        ).sum()

    torch.testing.assert_close(score(5, 3), score(45, 43), atol=1e-5, rtol=0)
    assert abs(score(5, 3) - score(5, 4)) > 1e-3
    torch.testing.assert_close(apply_rope(q, cos[:1], sin[:1]), q)


def test_no_position_sees_the_future():
    model = build_model(tiny(), 0).eval()
    ids = torch.randint(0, 50, (1, 16))
    changed = ids.clone()
    changed[0, 9] = (ids[0, 9] + 1) % 50
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9], after[:, 9])


def test_packed_documents_are_as_if_alone():
    model = build_model(tiny(), 0).eval()
    ids = torch.randint(0, 50, (2, 20))
    documents = torch.tensor([[4] * 7 + [2] * 13, [1] * 12 + [1000] * 8])
    with torch.no_grad():
        packed = model(ids, document_ids=documents)
        torch.testing.assert_close(packed[:1, 7:], model(ids[:1, 7:]), atol=2e-6, rtol=0)
        torch.testing.assert_close(packed[1:, :12], model(ids[1:, :12]), atol=2e-6, rtol=0)


def test_document_positions_restart():
    documents = torch.tensor([[7, 7, 9, 9, 9], [3, 3, 3, 3, 3]])
    assert document_positions(documents).tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]


class CountCalls(TorchDispatchMode):
    """Counts the products and the attentions that are computed."""

    def __init__(self):
        super().__init__()
        self.products = self.attentions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.products += name.startswith("aten.mm.")
        self.attentions += "attention" in name and "backward" not in name
        return function(*args, **(kwargs or {}))


def test_checkpointing_gives_the_same_gradients_and_selective_repeats_nothing_dear():
    ids, calls, gradients = torch.randint(0, 50, (2, 16)), {}, {}
    for mode in ("none", "blocks", "selective"):
        model = build_model(tiny(), 0)
        model.checkpoint = mode
        with CountCalls() as count:
            next_token_loss(model(ids), ids).backward()
        calls[mode] = (count.products, count.attentions)
        gradients[mode] = [parameter.grad for parameter in model.parameters()]
    for mode in ("blocks", "selective"):
        assert all(map(torch.equal, gradients["none"], gradients[mode]))
    n_layers, per_block = model.config.n_layers, 6  # the last product, down_proj, is not needed
    assert calls["none"] == calls["selective"]
    assert calls["blocks"] == (
        calls["none"][0] + per_block * n_layers,
        calls["none"][1] + n_layers,
    )


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_a_model_directory_round_trips(tmp_path, tie_embeddings):
    model = build_model(tiny(tie_embeddings=tie_embeddings), 0).eval()
    with build_artifact(tmp_path / "m", kind="pretrain", made_from=[]) as draft:
        save_model(model, draft.path)
    ids = torch.randint(0, 50, (1, 8))
    assert torch.equal(load_model(tmp_path / "m")(ids), model(ids))


def test_a_flipped_bit_in_the_weights_is_refused(tmp_path):
    with build_artifact(tmp_path / "m", kind="pretrain", made_from=[]) as draft:
        save_model(build_model(tiny(), 0), draft.path)
    path = tmp_path / "m/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="model.safetensors"):
        load_model(tmp_path / "m")


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="not a model directory"):
        load_model(tmp_path)


def test_round_up():
    assert [round_up(n, 64) for n in (1, 64, 65)] == [64, 64, 128]
