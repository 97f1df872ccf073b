import copy

import pytest
import torch
from chat_case import lora_params
from peft import PeftModel
from tiny_lm import tiny_model
from torch import nn
from transformers_twin import transformers_model

from tinyllm.artifact import build_artifact
from tinyllm.errors import ArtifactError, ParamsError
from tinyllm.finetune.adapter import load_adapter, save_adapter
from tinyllm.finetune.lora import LoRALinear, add_lora, lora_layers, merge_lora, trainable_share
from tinyllm.model.directory import load_model, save_model
from tinyllm.model.init import count_parameters
from tinyllm.params import build_params

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# logits here stay below 8 and pass through about 20 fp32 roundings of 6e-8 relative error
TOLERANCE = 8 * 20 * 6e-8


def adapted(seed=0, params=None, **changes):
    """A model whose adapter does something."""
    model = add_lora(tiny_model(seed, **changes), params or lora_params(targets=ALL), seed=5)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.normal_(0, 0.1, generator=generator)
    return model.eval()


def some_ids(vocab_size=97):
    return torch.randint(0, vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))


def write_adapter(model, folder):
    with build_artifact(folder, kind="adapter", made_from=[]) as draft:
        save_adapter(model, draft.path)
    return folder


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_no_targets_means_all_layers_of_the_blocks(tie_embeddings):
    named, all_of_them = (
        add_lora(tiny_model(tie_embeddings=tie_embeddings), lora_params(targets=targets), seed=5)
        for targets in (ALL, None)
    )
    first, second = named.state_dict(), all_of_them.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def test_a_new_adapter_changes_nothing():
    base = tiny_model(0)
    expected = base(some_ids())
    model = add_lora(base, lora_params(targets=ALL), seed=1)
    assert torch.equal(model(some_ids()), expected)


def test_a_layer_is_the_formula():
    params = lora_params(rank=3, alpha=6.0)
    layer = LoRALinear(nn.Linear(5, 7), params, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(4, 5, dtype=torch.float64)
    layer.double()
    expected = x @ layer.weight.T + layer.bias + 2.0 * (x @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer(x), expected)
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((3, 5), (7, 3))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(32, 8), (8, 32), (16, 16), (5, 7)])
def test_a_merged_layer_equals_the_unmerged_one(shape):
    layer = LoRALinear(nn.Linear(*shape), lora_params(), torch.Generator().manual_seed(0))
    layer.lora_B.normal_()
    x = torch.randn(50, shape[0])
    merged, bound = layer.merged()(x), x.double().abs() @ layer.merged().weight.double().abs().T
    # each of the two sums of n products is off by at most n ulps of the sum of their magnitudes
    scale = (bound + 2 * x.double().abs() @ (layer.lora_B @ layer.lora_A).double().abs().T).max()
    torch.testing.assert_close(merged, layer(x), atol=shape[0] * 6e-8 * scale.item(), rtol=0)


@torch.no_grad()
def test_a_merged_model_equals_the_unmerged_one():
    model = adapted()
    expected = model(some_ids())
    assert (expected - tiny_model(0)(some_ids())).abs().max() > 0.1  # the adapter does something
    merged = merge_lora(model)
    # 14 layers, each with three roundings of its own (two products and a sum), of 6e-8
    tolerance = 14 * 3 * 6e-8 * expected.abs().max().item()
    torch.testing.assert_close(merged(some_ids()), expected, atol=tolerance, rtol=0)


def test_a_merged_model_is_a_plain_model_directory(tmp_path):
    merged = merge_lora(adapted())
    assert {type(m) for m in merged.modules()} == {type(m) for m in tiny_model(0).modules()}
    assert count_parameters(merged) == count_parameters(tiny_model(0))
    with build_artifact(tmp_path / "merged", kind="lora", made_from=[]) as draft:
        save_model(merged, draft.path)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "merged")(some_ids()), merged(some_ids()))


def test_only_the_adapter_is_trained():
    base = tiny_model(0)
    before = copy.deepcopy(base.state_dict())
    model = add_lora(base, lora_params(targets=("o_proj", "up_proj")), seed=1)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2  # layers, targets, A and B
    assert all(name.endswith(("lora_A", "lora_B")) for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first step moves B alone, as A has no gradient while B is zero
        model(some_ids()).square().mean().backward()
        optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(layer.lora_B.abs().max() > 0 for _, layer in lora_layers(model))
    a = 3 * (32 + 32) + 3 * (32 + 64)  # rank (inputs + outputs) of o_proj and up_proj
    assert trainable_share(model) == 2 * a / (count_parameters(tiny_model(0)) + 2 * a)


def test_the_same_seed_gives_the_same_adapter():
    a, b, c = (add_lora(tiny_model(0), lora_params(), seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_dropout_works_in_training_only():
    model = adapted(params=lora_params(dropout=0.5, targets=ALL))
    with torch.no_grad():
        torch.testing.assert_close(model(some_ids()), model(some_ids()), atol=0, rtol=0)
        model.train()
        assert not torch.equal(model(some_ids()), model(some_ids()))


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("targets", [ALL, ("k_proj", "down_proj"), ("lm_head", "q_proj")])
def test_peft_reads_the_adapter_and_computes_the_same(tmp_path, qk_norm, targets):
    model = adapted(qk_norm=qk_norm, params=lora_params(targets=targets, rank=4, alpha=12.0))
    folder = write_adapter(model, tmp_path / "adapter")
    base = tiny_model(0, qk_norm=qk_norm)
    theirs = PeftModel.from_pretrained(transformers_model(base), folder).eval()
    ids = some_ids()
    assert (theirs(ids).logits - base(ids)).abs().max() > 0.01  # peft applies it
    torch.testing.assert_close(model(ids), theirs(ids).logits, atol=TOLERANCE, rtol=0)
    merged = transformers_model(merge_lora(model))
    their_merged = theirs.merge_and_unload()
    for name, weight in their_merged.state_dict().items():
        # W is added to a product of rank 4, both rounded: at most 8 ulps of their magnitudes
        torch.testing.assert_close(merged.state_dict()[name], weight, atol=8 * 6e-8 * 2, rtol=0)


@torch.no_grad()
def test_a_saved_adapter_comes_back(tmp_path):
    model = adapted()
    folder = write_adapter(model, tmp_path / "adapter")
    again = load_adapter(tiny_model(0), folder)
    assert torch.equal(again(some_ids()), model(some_ids()))


def test_adapters_are_the_same_bytes_each_time(tmp_path):
    one, two = (write_adapter(adapted(), tmp_path / name) for name in "ab")
    for name in ("adapter_config.json", "adapter_model.safetensors", "manifest.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_an_adapter_of_other_sizes_is_refused(tmp_path):
    folder = write_adapter(adapted(), tmp_path / "adapter")
    for other in (tiny_model(0, d_ff=128), tiny_model(0, n_layers=1), tiny_model(0, n_layers=3)):
        with pytest.raises(ArtifactError) as error:
            load_adapter(other, folder)
        assert "\n" not in str(error.value)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ArtifactError, match="adapter_config"):
        load_adapter(tiny_model(0), folder)


def test_unknown_targets_are_refused_with_a_hint():
    with pytest.raises(ParamsError, match=r"lora.targets: 'q_prj' names .*did you mean q_proj\?"):
        add_lora(tiny_model(0), lora_params(targets=("q_prj",)), seed=0)
    with pytest.raises(ParamsError, match="there are down_proj, gate_proj"):
        add_lora(tiny_model(0), lora_params(targets=("zzz",)), seed=0)
    with pytest.raises(ParamsError, match="lm_head shares its matrix with the embedding"):
        add_lora(tiny_model(0, tie_embeddings=True), lora_params(targets=("lm_head",)), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "lora.rank: must be at least 1"),
        ({"alpha": 0.0}, "lora.alpha: must be above 0"),
        ({"dropout": 1.0}, "lora.dropout: must be at least 0 and below 1"),
        ({"targets": []}, "lora.targets: empty"),
        ({"steps": 0}, "lora.steps: must be at least 1"),
        ({"target": []}, "lora.target: unknown parameter; did you mean targets?"),
    ],
)
def test_refused_parameters(changes, message):
    from dataclasses import asdict, make_dataclass

    section = make_dataclass("Section", [("lora", type(lora_params()))])
    values = {**asdict(lora_params()), "targets": ["q_proj"], **changes}
    with pytest.raises(ParamsError) as error:
        build_params(section, {"lora": values}, "params.yaml")
    assert message in str(error.value)


def test_any_module_with_linear_layers_will_do():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 9))
    x = torch.randn(3, 6)
    expected = model(x)
    add_lora(model, lora_params(targets=("0", "2")), seed=0)
    assert len(lora_layers(model)) == 2
    assert torch.equal(model(x), expected)
