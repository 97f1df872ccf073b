import json

import pytest
import torch
from tiny_dirs import write_model_dir

from tinyllm.artifact import load_manifest
from tinyllm.errors import ArtifactError, DataError
from tinyllm.inference.prefix import TENSORS, load_prefix, open_prefix, prefix_key, system_prefix
from tinyllm.inference.session import open_session
from tinyllm.ops.reference import quantize_per_row
from tinyllm.quantization.load import load_any_model
from tinyllm.tokenizer.chat import Message

IDS = [5, 17, 42, 8]


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [
        open_session(
            write_model_dir(root / str(seed), seed=seed), load_any_model, torch.device("cpu")
        )
        for seed in (0, 1)
    ]


def opened(root, session, ids=IDS):
    return open_prefix(root, session.directory, session.model, ids)


def test_it_is_computed_once_and_equals_a_full_pass(tmp_path, sessions):
    session = sessions[0]
    made, how = opened(tmp_path, session)
    assert how == "computed (first use)"
    again, how = opened(tmp_path, session)
    assert how == "loaded"
    assert again.ids == made.ids == tuple(IDS)
    assert torch.equal(again.keys.numbers, made.keys.numbers)
    assert torch.equal(again.values.numbers, made.values.numbers)
    first = session.model.layers[0]
    with torch.inference_mode():
        x = first.input_layernorm(session.model.embed_tokens(torch.tensor([IDS])))
        values = first.self_attn.v_proj(x).view(4, 1, 32).transpose(0, 1)
    assert torch.allclose(again.values[0].numbers, values, atol=1e-6)


def test_an_int8_one_keeps_its_scales(tmp_path, sessions, monkeypatch):
    plain, _ = opened(tmp_path, sessions[0])
    monkeypatch.setattr(sessions[0].model, "cache_dtype", torch.int8)
    made, how = opened(tmp_path, sessions[0])
    assert how == "computed (first use)"
    again, how = opened(tmp_path, sessions[0])
    assert how == "loaded"
    for exact, one, other in (
        (plain.keys, made.keys, again.keys),
        (plain.values, made.values, again.values),
    ):
        assert all(torch.equal(*pair) for pair in zip(one.tensors, other.tensors, strict=True))
        numbers, scales = quantize_per_row(exact.numbers[0])
        assert torch.equal(other.numbers[0], numbers)
        assert torch.equal(other.scales[0], scales)


def test_its_manifest_names_the_model(tmp_path, sessions):
    opened(tmp_path, sessions[0])
    (directory,) = tmp_path.iterdir()
    model = load_manifest(sessions[0].directory)
    assert load_manifest(directory, "prefix").lineage == {"sft": model.digest}


def test_models_tokens_and_types_have_prefixes_of_their_own(tmp_path, sessions):
    assert opened(tmp_path, sessions[0])[1] == "computed (first use)"
    assert opened(tmp_path, sessions[1])[1] == "computed (first use)"
    assert opened(tmp_path, sessions[0], IDS[:3])[1] == "computed (first use)"
    keys = {prefix_key(sessions[0].directory, IDS, t) for t in (torch.float32, torch.bfloat16)}
    assert len(keys) == 2
    assert len(list(tmp_path.iterdir())) == 3


def test_a_foreign_one_is_refused(tmp_path, sessions):
    opened(tmp_path, sessions[0])
    (directory,) = tmp_path.iterdir()
    key = prefix_key(sessions[1].directory, IDS, torch.float32)
    with pytest.raises(ArtifactError, match="not to this model"):
        load_prefix(directory, key)
    directory.rename(tmp_path / key[:24])
    _, how = opened(tmp_path, sessions[1])
    assert how.startswith("computed (")
    assert "not to this model" in how
    assert opened(tmp_path, sessions[1])[1] == "loaded"


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest"])
def test_a_damaged_one_is_computed_again(tmp_path, sessions, damage):
    made, _ = opened(tmp_path, sessions[0])
    (directory,) = tmp_path.iterdir()
    file = directory / ("manifest.json" if damage == "manifest" else TENSORS)
    raw = bytearray(file.read_bytes())
    if damage == "flip":
        raw[-3] ^= 1
    elif damage == "cut":
        raw = raw[:-8]
    else:
        raw = json.dumps({**json.loads(raw), "lineage": {"sft": "0"}}).encode()
    file.write_bytes(raw)
    again, how = opened(tmp_path, sessions[0])
    assert how.startswith("computed (")
    assert torch.equal(again.keys.numbers, made.keys.numbers)
    assert opened(tmp_path, sessions[0])[1] == "loaded"


def test_every_chat_under_a_system_message_begins_with_its_tokens(sessions):
    session = sessions[0]
    ids = system_prefix("Be brief.", session.template, session.tokenizer)
    for question in ("hello", "你好", ""):
        messages = [Message("system", "Be brief."), Message("user", question)]
        prompt, _ = session.template.encode(messages, session.tokenizer, add_generation_prompt=True)
        assert prompt[: len(ids)] == ids
    text = session.tokenizer.decode(ids, skip_special=False)
    assert text == "<|system|>Be brief.<|end|><|user|>"


def test_one_that_fills_the_context_is_refused(tmp_path, sessions):
    with pytest.raises(DataError, match="takes 48 of 48 tokens"):
        opened(tmp_path, sessions[0], [1] * 48)
