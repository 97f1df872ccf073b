"""The pruning tool on checkpoints that transformers itself wrote, not on ours."""

import json

import pytest
import tokenizers
import torch
from tiny_text import made_up_text, tiny_tokenizer

from tinyllm.errors import ArtifactError, DataError, GateError
from tinyllm.export import prune_hf as module
from tinyllm.export.prune_hf import prune_hf
from tinyllm.export.pruned_tokenizer import prune_document

CORPUS = "the other one said: the hand and the order, 12345 — naïve 😀\n" * 3 + "her son said\n"


def write_checkpoint(folder, kind="llama", rows=8):
    """A checkpoint of transformers with spare rows and a special token behind the vocabulary."""
    import transformers

    tokenizer = tokenizers.Tokenizer.from_str(tiny_tokenizer(600).backend.to_str())
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    vocab_size = tokenizer.get_vocab_size() + rows
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "bos_token_id": bos, "eos_token_id": bos + 1}
    if kind == "llama":
        config = transformers.LlamaConfig(
            **{**sizes, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 5},
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        model = transformers.GPT2LMHeadModel(config)
    model.generation_config.eos_token_id = [bos + 1, 0]
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>"
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(CORPUS, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # an untied head, and a tied one
def test_kept_text_has_the_same_tokens_and_logits(kind, tmp_path, corpus):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, out = write_checkpoint(tmp_path / "hf", kind), tmp_path / "out"
    report = prune_hf(folder, corpus, out, None)
    assert report.tokens_after < report.tokens_before - 100
    assert report.weight_bytes_after < report.weight_bytes_before
    assert report.bytes_per_token_before == report.bytes_per_token_after
    old, new = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(out)
    ids, moved = old(CORPUS)["input_ids"], new(CORPUS)["input_ids"]
    assert old.convert_ids_to_tokens(ids) == new.convert_ids_to_tokens(moved)
    assert ids[0] == old.bos_token_id != new.bos_token_id == moved[0]
    assert new.decode(moved, skip_special_tokens=True) == CORPUS
    assert max(moved) < report.tokens_after == len(new)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, out)]
    with torch.no_grad():
        before, after = (
            model(torch.tensor([i[:60]])).logits
            for model, i in zip(models, (ids, moved), strict=True)
        )
    rows = [
        old.convert_tokens_to_ids(token) for token in new.convert_ids_to_tokens(range(len(new)))
    ]
    torch.testing.assert_close(after, before[..., rows], atol=1e-6, rtol=0)
    assert models[1].config.bos_token_id == new.bos_token_id
    assert models[1].generation_config.eos_token_id == [new.eos_token_id, 0]


def test_fewer_tokens_than_the_corpus_needs(tmp_path, corpus):
    folder = write_checkpoint(tmp_path / "hf")
    report = prune_hf(folder, corpus, tmp_path / "out", 272)
    assert report.tokens_after == 272
    assert report.kept_texts < report.texts == 4
    assert report.bytes_per_token_after < report.bytes_per_token_before
    assert report.max_logit_diff < 1e-5
    with pytest.raises(ArtifactError, match="is there already"):
        prune_hf(folder, corpus, tmp_path / "out", 272)
    with pytest.raises(DataError, match="100 is too small, 26[0-9] tokens are made by no merge"):
        prune_hf(folder, corpus, tmp_path / "small", 100)
    assert not (tmp_path / "small").exists()


def test_unseen_text_still_comes_back(tmp_path, corpus):
    folder = write_checkpoint(tmp_path / "hf")
    prune_hf(folder, corpus, tmp_path / "out", None)
    small = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = made_up_text(200, 3)
    ids = small.encode(text, add_special_tokens=False).ids
    assert small.decode(ids, skip_special_tokens=False) == text


def test_a_wrong_row_is_found_and_nothing_stays(tmp_path, corpus, monkeypatch):
    folder = write_checkpoint(tmp_path / "hf")
    honest = module._cut_tables
    monkeypatch.setattr(
        module, "_cut_tables", lambda t, kept, f: honest(t, [*kept[:-1], kept[-1] - 1], f)
    )
    with pytest.raises(GateError, match="logits differ by"):
        prune_hf(folder, corpus, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_both_spellings_of_merges_and_every_place_of_an_id():
    document = {
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "bc": 5},
            "merges": ["a b", "ab c", "b c"],
        },
        "added_tokens": [{"id": 7, "content": "<s>"}],
        "post_processor": {
            "type": "Sequence",
            "processors": [
                {"special_tokens": {"<s>": {"id": "<s>", "ids": [7], "tokens": ["<s>"]}}},
                {"type": "RobertaProcessing", "sep": ["<s>", 7], "cls": ["<s>", 7]},
            ],
        },
    }
    pruned = prune_document(document, {3: 5, 0: 1}, None)
    assert pruned.kept == [0, 1, 2, 3, 7]
    assert pruned.document["model"]["vocab"] == {"a": 0, "b": 1, "c": 2, "ab": 3}
    assert pruned.document["model"]["merges"] == ["a b"]
    assert pruned.document["added_tokens"][0]["id"] == 4
    first, second = pruned.document["post_processor"]["processors"]
    assert first["special_tokens"]["<s>"]["ids"] == [4]
    assert (second["sep"], second["cls"]) == (["<s>", 4], ["<s>", 4])
    assert pruned.moved([7, 5, None]) == [4, 5, None]
    assert document["added_tokens"][0]["id"] == 7  # the original is left alone
    with pytest.raises(DataError, match="a Unigram model; only BPE"):
        prune_document({"model": {"type": "Unigram"}}, {}, None)


def test_bad_folders_are_refused_in_one_line(tmp_path, corpus):
    folder = write_checkpoint(tmp_path / "hf", rows=0)
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    with pytest.raises(DataError, match="the weights are quantised"):
        prune_hf(folder, corpus, tmp_path / "out", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="nothing: no text"):
        prune_hf(folder, tmp_path / "nothing", tmp_path / "out", None)
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"tokenizer.json: (damaged|not JSON)"):
        prune_hf(folder, corpus, tmp_path / "out", None)
    bigger = json.loads(tokenizer)
    bigger["added_tokens"].append({**bigger["added_tokens"][0], "id": 900, "content": "<more>"})
    (folder / "tokenizer.json").write_text(json.dumps(bigger))
    with pytest.raises(ArtifactError, match="tokenizer and weights do not belong together"):
        prune_hf(folder, corpus, tmp_path / "out", None)
    (folder / "tokenizer.json").write_text(tokenizer)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="is a pickle"):
        prune_hf(folder, corpus, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()
