"""The adapter folder in `peft` itself, not merged, against our merged model."""

import json
import re

import numpy as np
import pytest
import torch
from export_case import lively_model, write_adapted, write_clean, write_model
from test_families import FORMS, LATENT

from tinyllm.errors import ArtifactError, LineageError
from tinyllm.export.hf_runtime import PeftAdapter
from tinyllm.export.peft_folder import peft_refuses, write_peft
from tinyllm.model.directory import load_model

ATTENTION = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
KINDS = {"llama": {"qk_norm": False}, "qwen3": {}, "deepseek_v3": {**LATENT, "targets": ATTENTION}}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_peft_applies_the_adapter_as_our_merge_does(kind, tmp_path):
    write_clean(tmp_path / "clean")
    write_adapted(tmp_path, tmp_path / "clean", **KINDS[kind])
    write_peft(tmp_path / "sft", tmp_path / "adapter", tmp_path / "peft", "a card")
    ids = list(range(6, 60))
    theirs = PeftAdapter(tmp_path / "peft")
    base, merged = (load_model(tmp_path / n)(torch.tensor([ids]))[0] for n in ("sft", "merged"))
    assert (base - merged).abs().max() > 0.1
    # largest logits of about 10; the low-rank product is summed in another order than merged
    np.testing.assert_allclose(theirs.logits(ids), merged.numpy(), atol=5e-5, rtol=0)
    theirs.model = theirs.model.merge_and_unload()
    np.testing.assert_allclose(theirs.logits(ids), merged.numpy(), atol=5e-5, rtol=0)


def test_adapter_of_another_base_and_a_damaged_one_are_refused(tmp_path):
    write_clean(tmp_path / "clean")
    write_adapted(tmp_path, tmp_path / "clean")
    write_model(tmp_path / "other", tmp_path / "clean", tie_embeddings=True)
    manifest = tmp_path / "other" / "manifest.json"
    with pytest.raises(LineageError, match="do not belong together: clean"):
        write_clean(tmp_path / "clean2", seed=9)
        write_model(tmp_path / "other", tmp_path / "clean2")
        write_peft(tmp_path / "other", tmp_path / "adapter", tmp_path / "peft", "")
    assert json.loads(manifest.read_text())["kind"] == "lora"
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ArtifactError, match="differs from its manifest"):
        write_peft(tmp_path / "sft", tmp_path / "adapter", tmp_path / "peft", "")
    assert not (tmp_path / "peft").exists()


def test_what_has_no_place_in_peft_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"target_modules": ["q_proj", "up_proj"]}')
    for changes, reason in (
        (FORMS["gpt2"], "hf/ has it merged"),
        ({"ffn": "relu2"}, "would need model.ffn=swiglu"),
        (LATENT, "up_proj of DeepSeek-V3 for experts.* attention layers only works"),
    ):
        assert re.search(reason, peft_refuses(lively_model(97, **changes).config, tmp_path))
    assert peft_refuses(lively_model(97).config, tmp_path) is None
