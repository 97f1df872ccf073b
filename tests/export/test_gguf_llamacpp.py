"""The written files in llama.cpp itself, where llama-cpp-python is installed."""

import gguf
import numpy as np
import pytest
import torch
from gguf_case import FORMS, write_forms
from tiny_text import REAL, made_up_text, real_text

from tinyllm.errors import ArtifactError, DataError
from tinyllm.export import llamacpp_runtime
from tinyllm.export.gguf import write_gguf
from tinyllm.export.llamacpp_runtime import LlamaCppModel, has_llamacpp
from tinyllm.export.verify import build_references, compare
from tinyllm.model.directory import load_model
from tinyllm.tokenizer.tokenizer import Tokenizer

needs_llamacpp = pytest.mark.skipif(not has_llamacpp(), reason="llama-cpp-python is not installed")
PROMPTS = [[7, 8, 9, 10], [20, 21], [300, 14, 99], [50]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_forms(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def references(sources):
    """Our 200 greedy tokens and all logits, per form."""
    return {name: build_references(load_model(sources / name), PROMPTS, 50) for name in FORMS}


def open_file(sources, form, kind):
    path = sources / f"{form}.{kind}.gguf"
    if not path.exists():
        write_gguf(sources / form, path, kind)
    return LlamaCppModel(path, n_threads=1)


@needs_llamacpp
@pytest.mark.parametrize("form", FORMS)
def test_llamacpp_gives_our_logits_and_our_200_tokens(sources, references, form):
    parity = compare(references[form], open_file(sources, form, "f32"))
    assert parity.max_logit_diff < 1e-4
    assert parity.max_cached_logit_diff < 1e-4
    assert parity.greedy_equal_tokens == parity.greedy_tokens == 200
    assert parity.top1_agreement == 1


def with_stored_weights(source, kind):
    """Our own model with the matrices as the file holds them."""
    model = load_model(source)
    with torch.no_grad():
        for w in model.parameters():
            if w.ndim == 2:
                whole = kind == "q8_0" and w.shape[1] % 32 == 0
                stored = gguf.GGMLQuantizationType.Q8_0 if whole else gguf.GGMLQuantizationType.F16
                data = gguf.quants.quantize(w.numpy(), stored)
                w.copy_(torch.from_numpy(gguf.dequantize(data, stored)))
    return model


@needs_llamacpp
@pytest.mark.parametrize("form", ["llama", "qwen3, tied", "deepseek2, low-rank query, yarn"])
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_fewer_bits_cost_what_their_rounding_costs(sources, references, form, kind):
    runtime, rounded = (
        open_file(sources, form, kind),
        with_stored_weights(sources / form, kind),
    )
    texts = [[*reference.prompt_ids, *reference.answer[:-1]] for reference in references[form]]
    ours = np.concatenate([reference.logits for reference in references[form]])
    theirs = np.concatenate([runtime.logits(text) for text in texts])
    with torch.no_grad():
        ours_rounded = np.concatenate([rounded(torch.tensor([text]))[0] for text in texts])
    # llama.cpp rounds what a matrix multiplies like the matrix itself: two errors of one size
    expected, error = np.sqrt(2) * (ours_rounded - ours).std(), (theirs - ours).std()
    assert expected / 1.5 < error < 1.5 * expected
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (ours, theirs))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert kl < error**2  # to second order it is half the variance under p
    first, second = np.sort(ours, -1)[:, -1], np.sort(ours, -1)[:, -2]
    parted = ours.argmax(-1) != theirs.argmax(-1)
    assert parted.mean() < 2 * error / np.median(first - second)


@needs_llamacpp
def test_llamacpp_cuts_text_as_we_do(sources):
    ours, theirs = Tokenizer.load(sources / "llama"), open_file(sources, "llama", "f32")
    texts = [made_up_text(200, seed) for seed in range(8)]
    texts += ["", " ", "\0", "a <|user|> b", "x\r\n\r\n  y", "12345 ١٢٣٤ Ⅷ ½", "it'S ''s 'tis"]
    assert [theirs.encode(text) for text in texts] == ours.encode_batch(texts)
    assert 2 not in theirs.encode("a <|user|> b")


@needs_llamacpp
@pytest.mark.skipif(not REAL.is_file(), reason="no real text beside the repository")
def test_llamacpp_cuts_a_real_text_as_we_do(sources):
    ours, theirs = Tokenizer.load(sources / "llama"), open_file(sources, "llama", "f32")
    paragraphs = real_text(300_000).split("\n\n")
    assert [theirs.encode(text) for text in paragraphs] == ours.encode_batch(paragraphs)


@needs_llamacpp
def test_only_letters_and_digits_of_unicode_16_are_cut_otherwise(sources):
    """All of Unicode was tried once: 4382 characters differ, and all are of that version."""
    ours, theirs = Tokenizer.load(sources / "llama"), open_file(sources, "llama", "f32")

    def differs(character):
        text = f"{character}'LL 1{character}123 {character}x{character}{character}\n"
        return theirs.encode(text) != ours.encode(text)

    assert differs("\U00010d50")  # GARAY CAPITAL LETTER A
    assert not any(differs(chr(code)) for code in range(0x20, 0x1C89, 7))
    assert not any(differs(chr(code)) for code in range(0x1F000, 0x1FB00, 13))


@needs_llamacpp
def test_text_ends_where_ours_ends(sources):
    model = open_file(sources, "llama", "f32")
    ends = [i for i in range(400) if model._lib.llama_vocab_is_eog(model._vocab, i)]
    assert ends == [0, 4]  # the end of a text and of a turn
    assert not model._lib.llama_vocab_get_add_bos(model._vocab)


@needs_llamacpp
def test_calls_do_not_remember_each_other(sources):
    model = open_file(sources, "qwen3, tied", "f32")
    first = model.logits([7, 8, 9])
    model.greedy([50, 51], 5)
    assert (model.logits([7, 8, 9]) == first).all()


@needs_llamacpp
def test_more_than_the_context_and_damaged_files_are_refused(sources, tmp_path):
    with pytest.raises(DataError, match="llama.cpp: 300 tokens are more than the context of 64"):
        open_file(sources, "llama", "f32").logits([7] * 300)
    whole = (sources / "llama.f32.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-1000])
    with pytest.raises(ArtifactError, match="truncated"):
        LlamaCppModel(tmp_path / "cut.gguf", n_threads=1)
    other = whole.replace(b"\0llama", b"\0lamma", 1)  # an architecture that nobody has
    (tmp_path / "other.gguf").write_bytes(other)
    with pytest.raises(ArtifactError, match="llama.cpp cannot load it"):
        LlamaCppModel(tmp_path / "other.gguf", n_threads=1)


def test_what_is_not_installed_is_said_and_not_passed(sources, monkeypatch):
    monkeypatch.setattr(llamacpp_runtime, "PACKAGE", "no_such_package")
    assert not has_llamacpp()
    with pytest.raises(DataError, match="llama.cpp: not installed; `pip install llama-cpp-python`"):
        LlamaCppModel(sources / "llama.f32.gguf", n_threads=1)
