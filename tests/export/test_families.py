"""The same architecture in transformers and here, weights copied both ways."""

import dataclasses
import json

import pytest
import torch
from export_case import lively_model, write_clean, write_model
from safetensors.torch import save_file
from tiny_lm import VOCAB

from tinyllm.artifact import load_manifest
from tinyllm.errors import ArtifactError, DataError
from tinyllm.export.families import CLASSES, family_of, hf_config
from tinyllm.export.hf_import import import_hf
from tinyllm.export.hf_weights import from_hf, to_hf
from tinyllm.model.directory import load_model
from tinyllm.model.sizes import MlaSizes, RopeScaling

MLA = MlaSizes(
    q_rank=None, kv_rank=24, d_nope=8, d_rope=6, d_v=12
)  # 6: no order is its own inverse
LATENT = {"mla": MLA, "d_head": 14, "qk_norm": False, "n_kv_heads": 4}
YARN = {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_len=16)}
FORMS = {
    "llama": {"qk_norm": False},
    "llama, multi-query, linear scaling, tied": {
        **{"qk_norm": False, "n_kv_heads": 1, "tie_embeddings": True, "rope_base": 500.0},
        "rope_scaling": RopeScaling(kind="linear", factor=2.0, original_len=32),
    },
    "qwen3, yarn": YARN,
    "qwen3, window": {"window": 6, "window_layers": (1,), "norm_eps": 1e-5},
    "deepseek_v3": LATENT,
    "deepseek_v3, low-rank query, yarn": {
        **{**LATENT, "mla": dataclasses.replace(MLA, q_rank=16)},
        **YARN,
    },
    "gpt2": {
        **{"norm": "layernorm", "ffn": "gelu", "bias": True, "positions": "learned"},
        **{"n_kv_heads": 4, "qk_norm": False, "tie_embeddings": True, "norm_eps": 1e-5},
    },
}
TOLERANCE = 2e-5  # logits of about 10 through some 30 roundings of 6e-8
IDS = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(2))


def build_theirs(content, seed=0):
    """A model of transformers whose norms, biases and all are no neutral values."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**content)
    model = getattr(transformers, content["architectures"][0])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_our_weights_give_our_logits_there(form):
    ours = lively_model(VOCAB, **FORMS[form])
    family = family_of(ours.config)
    assert family == form.split(",")[0]
    theirs = build_theirs(hf_config(ours.config))
    weights = to_hf(ours.state_dict(), ours.config, family)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not missing
    assert not unexpected
    logits = theirs(IDS).logits
    torch.testing.assert_close(ours(IDS), logits, atol=TOLERANCE, rtol=0)
    assert logits.std() > 0.5  # nothing vanished


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_their_folder_gives_their_logits_here(form, tmp_path):
    content = hf_config(lively_model(VOCAB, **FORMS[form]).config)
    theirs = build_theirs(content)
    theirs.save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ours")
    ours = load_model(tmp_path / "ours")
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=TOLERANCE, rtol=0)
    assert load_manifest(tmp_path / "ours").info["imported_class"] == content["architectures"][0]


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back_is_every_bit(form):
    ours = lively_model(VOCAB, **FORMS[form])
    family, state = family_of(ours.config), ours.state_dict()
    back = from_hf(to_hf(state, ours.config, family), ours.config, family)
    assert set(back) >= set(state) - {"lm_head.weight"}
    assert all(torch.equal(back[name], state[name]) for name in back)


def test_our_own_export_comes_back_with_its_tokenizer(tmp_path):
    from tinyllm.export.hf import write_hf
    from tinyllm.tokenizer.tokenizer import Tokenizer

    write_clean(tmp_path / "clean")
    write_model(tmp_path / "model", tmp_path / "clean", **LATENT)
    write_hf(tmp_path / "model", tmp_path / "hf", "a card")
    import_hf(tmp_path / "hf", tmp_path / "back")
    ids = torch.arange(6, 40)[None]
    first, second = load_model(tmp_path / "model"), load_model(tmp_path / "back")
    assert torch.equal(first(ids), second(ids))
    assert Tokenizer.load(tmp_path / "back").vocab_size == first.config.vocab_size


def llama_folder(folder, **changes):
    folder.mkdir()
    ours = lively_model(VOCAB, qk_norm=False)
    content = {**hf_config(ours.config), **changes}
    (folder / "config.json").write_text(json.dumps(content))
    return folder, to_hf(ours.state_dict(), ours.config, "llama")


def test_a_checkpoint_in_parts_and_in_bf16_is_read(tmp_path):
    folder, weights = llama_folder(tmp_path / "hf")
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        part = {n: w.bfloat16().clone() for n, w in weights.items() if places[n] == file}
        save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    import_hf(folder, tmp_path / "ours")
    embedding = load_model(tmp_path / "ours").embed_tokens.weight
    assert torch.equal(embedding, weights["model.embed_tokens.weight"].bfloat16().float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported; llama, qwen3"),
        ({"attention_bias": True}, "attention_bias True is not supported; False is"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; 'silu' is"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rotary scaling 'llama3' is not supported"),
        ({"quantization_config": {}}, "the weights are quantised"),
        ({"model_type": "deepseek_v3"}, "blocks from 3 on are mixtures|has no kv_lora_rank"),
        ({"hidden_size": 48}, "weights do not fit config.json: embed_tokens.weight is"),
        ({"num_hidden_layers": 1}, "layers.1.[a-z_.]* has no place in this architecture"),
        ({"num_hidden_layers": 3}, "layers.2.[a-z_.]* is missing"),
    ],
)
def test_what_is_not_ours_is_refused_in_one_line(tmp_path, changes, message):
    folder, weights = llama_folder(tmp_path / "hf", **changes)
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / "model.safetensors")
    with pytest.raises((DataError, ArtifactError), match=message) as refusal:
        import_hf(folder, tmp_path / "ours")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "ours").exists()


def test_pickled_and_missing_weights_are_refused(tmp_path):
    folder, weights = llama_folder(tmp_path / "hf")
    with pytest.raises(ArtifactError, match="has no model.safetensors$"):
        import_hf(folder, tmp_path / "ours")
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pytorch_model\.bin is a pickle, .*; take the"):
        import_hf(folder, tmp_path / "ours")
    with pytest.raises(ArtifactError, match="no such file; name a Hugging Face"):
        import_hf(tmp_path, tmp_path / "ours")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ffn": "relu2"}, "Qwen3ForCausalLM, would need model.ffn=swiglu"),
        ({"window": 4, "window_layers": (0,), "qk_norm": False}, "model.window=null"),
        ({"norm": "layernorm", "qk_norm": False}, "LlamaForCausalLM, would need model.norm=rms"),
        ({**LATENT, "window": 4, "window_layers": (0,)}, "DeepseekV3.*need model.window=null"),
        ({**FORMS["gpt2"], "n_kv_heads": 2}, "GPT2LMHeadModel, .* model.n_kv_heads=n_heads"),
    ],
)
def test_what_transformers_lacks_is_refused_with_what_would_work(changes, expected):
    with pytest.raises(DataError, match=f"^export: transformers has no class.*{expected}") as error:
        hf_config(lively_model(VOCAB, **changes).config)
    assert "\n" not in str(error.value)


def test_every_class_is_proven():
    assert {form.split(",")[0] for form in FORMS} == set(CLASSES)
