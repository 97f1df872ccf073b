"""What is written, read back by the `gguf` package and by transformers; refusals and bad files."""

import json
import shutil

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from gguf import GGMLQuantizationType as Stored
from gguf_case import FORMS, LATENT, LINEAR, LOW_RANK, YARN, expected_tensors, write_forms
from tiny_lm import tiny_config
from tiny_text import made_up_text

from tinyllm.artifact import build_artifact, load_manifest
from tinyllm.errors import ArtifactError, DataError, LineageError
from tinyllm.export import gguf as exported
from tinyllm.export.gguf import check_gguf, read_gguf, write_gguf
from tinyllm.export.gguf_layout import architecture_of, gguf_refusal
from tinyllm.model.directory import load_config, load_model, load_weights
from tinyllm.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A model directory per form, and its files beside it."""
    return write_forms(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def file_of(sources):
    """Write a form once per type."""

    def write(form, kind="f32"):
        path = sources / f"{form}.{kind}.gguf"
        if not path.exists():
            write_gguf(sources / form, path, kind)
        return path

    return write


def value(reader, key):
    return reader.get_field(key).contents()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_every_weight_comes_back(sources, file_of, form, kind):
    reader, expected = read_gguf(file_of(form, kind)), expected_tensors(sources / form)
    assert {tensor.name for tensor in reader.tensors} == set(expected)
    scaled = load_config(sources / form)[0].norm_eps != 1e-6
    for tensor in reader.tensors:
        w = expected[tensor.name]
        assert tensor.data_offset % 32 == 0
        assert tuple(tensor.shape[::-1]) == w.shape
        if kind == "f32" or w.ndim == 1:
            assert tensor.tensor_type == Stored.F32
            # the factor of a scaled row and its product are rounded once each
            np.testing.assert_allclose(tensor.data, w, rtol=2**-23 if scaled else 0)
        elif kind == "f16" or w.shape[-1] % 32:
            assert tensor.tensor_type == Stored.F16
            np.testing.assert_allclose(tensor.data, w, rtol=2**-11, atol=2**-25)
        else:
            assert tensor.tensor_type == Stored.Q8_0
            blocks = w.astype(np.float32)
            assert tensor.data.tobytes() == gguf.quants.quantize(blocks, Stored.Q8_0).tobytes()
            back = gguf.dequantize(tensor.data, Stored.Q8_0)
            step = np.abs(w.reshape(-1, 32)).max(1) / 127
            # half a step, and the scale's own rounding to 11 bits times up to 127 steps
            error = np.abs(back - w).reshape(-1, 32).max(1)
            assert (error <= step * (0.5 + 127 * 2**-11) + 1e-9).all()
    kinds = {tensor.tensor_type.name.lower() for tensor in reader.tensors}
    assert kind in kinds
    ftype = {"f32": 0, "f16": 1, "q8_0": 7}[kind]
    assert value(reader, "general.file_type") == ftype


def test_a_block_of_q8_0_is_a_scale_and_32_bytes(sources, file_of):
    reader = read_gguf(file_of("llama", "q8_0"))
    tensor = next(t for t in reader.tensors if t.name == "blk.0.ffn_up.weight")
    raw = tensor.data.reshape(-1, 34)
    scale, weights = raw[:, :2].copy().view(np.float16), raw[:, 2:].view(np.int8)
    ours = load_weights(sources / "llama")["layers.0.mlp.up_proj.weight"].numpy().reshape(-1, 32)
    assert (scale[:, 0] == (np.abs(ours).max(1) / np.float32(127)).astype(np.float16)).all()
    assert (np.abs(weights).max(1) == 127).all()
    assert (np.sign(weights) * np.sign(ours) >= 0).all()


def test_metadata_are_names_that_gguf_knows(file_of):
    def strings(kind):
        for name, entry in vars(kind).items():
            if isinstance(entry, type):
                yield from strings(entry)
            elif isinstance(entry, str) and not name.startswith("_"):
                yield entry

    for form in FORMS:
        reader = read_gguf(file_of(form))
        known = {
            k.replace("{arch}", value(reader, "general.architecture")) for k in strings(gguf.Keys)
        }
        ours = {key for key in reader.fields if not key.startswith(("GGUF.", "tinyllm."))}
        assert ours <= known


def test_sizes_of_latent_attention_are_those_of_its_absorbed_form(file_of):
    reader = read_gguf(file_of("deepseek2, low-rank query, yarn"))
    names = {
        **{"attention.head_count": 4, "attention.head_count_kv": 1, "attention.q_lora_rank": 16},
        **{"attention.key_length": 38, "attention.value_length": 32, "rope.dimension_count": 6},
        **{"attention.key_length_mla": 14, "attention.value_length_mla": 12},
        **{"leading_dense_block_count": 2, "expert_shared_count": 0},
        **{"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 16},
    }
    assert {name: value(reader, f"deepseek2.{name}") for name in names} == names


def test_tokenizer_rebuilt_from_the_file_gives_our_ids(sources, file_of):
    reader, ours = read_gguf(file_of("llama")), Tokenizer.load(sources / "llama")
    tokens = value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value(reader, "tokenizer.ggml.merges")]
    kinds = value(reader, "tokenizer.ggml.token_type")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    rebuilt = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    rebuilt.pre_tokenizer = ours.backend.pre_tokenizer
    text = made_up_text(500, seed=5)
    assert rebuilt.encode(text).ids == ours.encode(text)
    assert len(tokens) == len(kinds) == ours.vocab_size
    assert [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL] == [*range(6)]
    assert set(kinds) == {gguf.TokenType.NORMAL, gguf.TokenType.CONTROL}
    ids = {"bos": 0, "eos": 4, "padding": 5}
    assert {name: value(reader, f"tokenizer.ggml.{name}_token_id") for name in ids} == ids
    assert value(reader, "tokenizer.ggml.pre") == "dbrx"
    assert value(reader, "tokenizer.ggml.add_bos_token") is False
    template = (sources / "llama" / "chat_template.jinja").read_text()
    assert value(reader, "tokenizer.chat_template") == template


def test_transformers_reads_the_file_as_the_same_llama(sources, file_of):
    from transformers import AutoModelForCausalLM

    path = file_of("llama")
    theirs = AutoModelForCausalLM.from_pretrained(
        sources, gguf_file=path.name, local_files_only=True
    )
    ids = torch.arange(6, 60)[None]
    with torch.no_grad():
        expected, logits = load_model(sources / "llama")(ids), theirs(ids).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


def test_same_model_same_bytes(sources, file_of, tmp_path):
    for kind in ("f32", "q8_0"):
        write_gguf(sources / "llama", tmp_path / "again.gguf", kind)
        assert (tmp_path / "again.gguf").read_bytes() == file_of("llama", kind).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.gguf"]


def test_file_knows_its_ancestors_and_other_models_are_refused(sources, file_of):
    path, source = file_of("llama"), sources / "llama"
    check_gguf(path, source)
    manifest = load_manifest(source)
    assert value(read_gguf(path), "tinyllm.digest") == manifest.digest
    assert value(read_gguf(path), "tinyllm.lineage.clean") == manifest.lineage["clean"]
    with pytest.raises(LineageError, match="do not belong together: made from") as refusal:
        check_gguf(path, sources / "qwen3, tied")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("share", [0.0, 0.0002, 0.05, 0.3, 0.6, 0.99, 0.99999])
def test_truncated_file_is_refused_in_one_line(file_of, tmp_path, share):
    whole = file_of("llama").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ArtifactError, match=r"cut\.gguf: truncated or no GGUF file") as refusal:
        read_gguf(tmp_path / "cut.gguf")
    assert "\n" not in str(refusal.value)


def test_what_is_no_gguf_file_is_refused(sources, tmp_path):
    with pytest.raises(ArtifactError, match="no such file; build it"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(ArtifactError, match="GGUF magic invalid"):
        read_gguf(sources / "llama" / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"window": 4, "window_layers": (0,)}, "qwen3, would need model.window=null"),
        ({"ffn": "relu2", "qk_norm": False}, "llama, would need model.ffn=swiglu"),
        ({"bias": True, "qk_norm": False}, "llama, would need model.bias=false"),
        (
            {"positions": "learned", "norm": "layernorm", "ffn": "gelu", "qk_norm": False},
            "llama, would need model.norm=rmsnorm, model.ffn=swiglu, model.positions=rope",
        ),
        ({**LATENT, **LINEAR}, "would need model.rope_scaling.kind=yarn"),
        (
            {**LOW_RANK, "n_layers": 26},
            "would need model.mla.q_rank=null or another model.n_layers",
        ),
    ],
)
def test_what_llamacpp_is_not_is_refused_with_what_would_work(changes, expected):
    config = tiny_config(**changes)
    assert expected in gguf_refusal(config)
    with pytest.raises(DataError, match="^GGUF: llama.cpp") as refusal:
        architecture_of(config)
    assert "\n" not in str(refusal.value)


def spoilt(source, folder, change):
    """A copy of a model directory with another tokenizer.json and a manifest that fits."""
    document = json.loads((source / "tokenizer.json").read_text())
    change(document)
    with build_artifact(folder, kind="imported", made_from=[]) as draft:
        for name in ("config.json", "model.safetensors", "chat_template.jinja"):
            shutil.copyfile(source / name, draft.path / name)
        (draft.path / "tokenizer.json").write_text(json.dumps(document))
    return folder


def gpt2_split(document):
    document["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
    }


def one_token_less(document):
    vocabulary = document["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    del vocabulary[last]
    document["model"]["merges"] = [
        merge for merge in document["model"]["merges"] if "".join(merge) != last
    ]


def lower_case(document):
    document["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gpt2_split, "cuts text by rules that llama.cpp has no name for"),
        (lower_case, "cuts text by rules that llama.cpp has no name for"),
        (one_token_less, "has 399 tokens, the model 400"),
    ],
)
def test_tokenizer_that_llamacpp_would_read_otherwise_is_refused(
    sources, tmp_path, change, message
):
    source = spoilt(sources / "llama", tmp_path / "model", change)
    with pytest.raises((DataError, ArtifactError), match=message):
        write_gguf(source, tmp_path / "model.gguf", "f32")
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_failed_write_leaves_the_older_file(sources, file_of, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    shutil.copyfile(file_of("llama"), path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exported.gguf.GGUFWriter, "write_ti_data_to_file", fail)
    with pytest.raises(OSError, match="No space left"):
        write_gguf(sources / "qwen3, tied", path, "f32")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_yarn_of_grouped_heads_needs_no_multiplier(file_of):
    reader = read_gguf(file_of("qwen3, yarn"))
    assert reader.get_field("qwen3.rope.scaling.yarn_log_multiplier") is None
    assert value(reader, "qwen3.rope.scaling.factor") == YARN["rope_scaling"].factor
