import json

import numpy as np
import pytest
import torch
from export_case import write_clean, write_model

from tinyllm.artifact import load_manifest
from tinyllm.export.card import model_card
from tinyllm.export.hf import write_hf
from tinyllm.export.hf_runtime import TransformersModel
from tinyllm.model.directory import load_config, load_model
from tinyllm.tokenizer.tokenizer import Tokenizer

FORMS = {
    "qwen3-tied": {"qk_norm": True, "tie_embeddings": True},
    "llama-untied": {"qk_norm": False, "tie_embeddings": False, "rope_base": 500.0},
}


@pytest.fixture(scope="module", params=FORMS, ids=str)
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    write_clean(folder / "clean")
    write_model(folder / "model", folder / "clean", **FORMS[request.param])
    write_hf(folder / "model", folder / "hf", "a card")
    return request.param, folder / "model", folder / "hf"


def test_transformers_gives_our_logits_and_our_class(exported):
    form, source, folder = exported
    theirs, ours = TransformersModel(folder), load_model(source)
    expected = "Qwen3ForCausalLM" if form.startswith("qwen3") else "LlamaForCausalLM"
    assert type(theirs.model).__name__ == expected
    ids = list(range(6, 60))
    with torch.no_grad():
        reference = ours(torch.tensor([ids]))[0].numpy()
    np.testing.assert_allclose(theirs.logits(ids), reference, atol=2e-5, rtol=0)


def test_tied_head_is_stored_once(exported):
    from safetensors import safe_open

    form, _, folder = exported
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
    assert ("lm_head.weight" in names) == (form == "llama-untied")
    assert all(name.startswith("model.") for name in names - {"lm_head.weight"})


def test_config_names_the_rotary_base_and_the_dtype_for_both_generations(exported):
    _, source, folder = exported
    base = load_config(source)[0].rope_base
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == base
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["head_dim"] == 8


def test_generate_ends_at_the_end_of_a_turn_or_text(exported):
    from transformers import GenerationConfig

    config = GenerationConfig.from_pretrained(exported[2])
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == ([4, 0], 0, 5)


def test_tokenizer_keeps_its_ids_and_its_length(exported):
    _, source, folder = exported
    tokenizer, theirs = Tokenizer.load(source), TransformersModel(folder).tokenizer
    text = "  It's 12345 — naïve 😀\n\n\tx² .  , 'tis"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert TransformersModel(folder).encode("a <|user|> b") == tokenizer.encode("a <|user|> b")
    assert 2 not in tokenizer.encode("a <|user|> b")
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 4, 5)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.model_max_length == 64


def test_card_has_lineage_and_numbers(exported):
    _, source, _ = exported
    manifest = load_manifest(source)
    card = model_card(load_config(source)[0], 1234567, manifest, {"val_bpb": 1.98765})
    assert "1,234,567 parameters" in card
    assert "| val_bpb | 1.98765 |" in card
    assert manifest.digest in card
    assert manifest.lineage["clean"] in card
