import numpy as np
import pytest
from export_case import lively_model
from tiny_text import made_up_text, tiny_tokenizer

from tinyllm.errors import GateError
from tinyllm.export.params import ExportParams
from tinyllm.export.verify import (
    TextParity,
    build_references,
    check_parity,
    compare,
    compare_text,
    cut_prompts,
)
from tinyllm.tokenizer.chat import ChatTemplate, Message

PROMPTS = [[7, 8, 9, 10], [20, 21]]
SAME_TEXT = TextParity(texts=1, text_tokens=9, unequal_texts=0, chats=1, unequal_chats=0)


class Echo:
    """A runtime that gives our own answers, changed where a test wants it."""

    def __init__(self, references):
        self.references = references
        self.full = [r.logits.copy() for r in references]
        self.steps = [r.logits[len(r.prompt_ids) - 1 :].copy() for r in references]

    def _index(self, ids):
        return next(i for i, r in enumerate(self.references) if r.prompt_ids[:2] == list(ids[:2]))

    def logits(self, ids):
        return self.full[self._index(ids)]

    def greedy(self, prompt_ids, n_tokens):
        steps = self.steps[self._index(prompt_ids)]
        return steps.argmax(-1).tolist()[:n_tokens], steps[:n_tokens]


@pytest.fixture(scope="module")
def references():
    return build_references(lively_model(97), PROMPTS, 20)


def test_reference_keeps_the_logits_its_greedy_tokens_come_from(references):
    for reference, prompt in zip(references, PROMPTS, strict=True):
        assert len(reference.answer) == 20
        assert len(reference.logits) == len(prompt) + 19
        assert reference.logits[len(prompt) - 1 :].argmax(-1).tolist() == reference.answer


def test_continuation_ends_with_the_context():
    model = lively_model(97)  # 64 positions
    (reference,) = build_references(model, [[1] * 60], 20)
    assert len(reference.answer) == 4


def test_equal_runtime_has_no_difference(references):
    parity = compare(references, Echo(references))
    assert (parity.max_logit_diff, parity.max_cached_logit_diff, parity.divergence_margin) == (
        0,
        0,
        0,
    )
    assert parity.top1_agreement == 1
    assert parity.greedy_equal_tokens == parity.greedy_tokens == 40
    assert parity.positions == 4 + 19 + 2 + 19
    check_parity({"echo": parity}, SAME_TEXT, 1e-4)


def test_one_wrong_logit_fails_with_its_size(references):
    echo = Echo(references)
    echo.full[1][3, 5] -= 0.25
    parity = compare(references, echo)
    assert parity.max_logit_diff == pytest.approx(0.25)
    with pytest.raises(GateError, match=r"^export: echo: logits differ from ours by 0.25"):
        check_parity({"echo": parity}, SAME_TEXT, 1e-4)


def test_nan_fails(references):
    echo = Echo(references)
    echo.full[0][0, 0] = np.nan
    with pytest.raises(GateError, match="nan"):
        check_parity({"echo": compare(references, echo)}, SAME_TEXT, 1e-4)


def test_cache_that_is_lost_in_the_sixth_step_is_found(references):
    echo = Echo(references)
    echo.steps[0][5:] = echo.steps[0][0]
    parity = compare(references, echo)
    assert parity.greedy_equal_tokens == 5 + 20
    assert parity.max_cached_logit_diff > 0.1
    with pytest.raises(GateError, match=r"parts from ours after 25 of 40 tokens"):
        check_parity({"echo": parity}, SAME_TEXT, 1e-4)


def test_tie_decided_by_rounding_is_no_failure(references):
    echo = Echo(references)
    second, first = np.argsort(echo.steps[0][3])[-2:]
    for logits in (references[0].logits[6], echo.steps[0][3], echo.full[0][6]):
        logits[second] = logits[first]
    echo.steps[0][3, second] += 1e-5
    parity = compare(references, echo)
    assert parity.greedy_equal_tokens == 3 + 20
    check_parity({"echo": parity}, SAME_TEXT, 1e-4)


class Text:
    """A text runtime with a mistake."""

    def __init__(self, tokenizer, template):
        self.tokenizer, self.template = tokenizer, template

    def encode(self, text):
        ids = self.tokenizer.encode(text)
        return ids[1:] if "bad" in text else ids

    def render(self, chat):
        ids, _ = self.template.encode(chat, self.tokenizer, add_generation_prompt=True)
        return self.template.render(chat, add_generation_prompt=len(chat) == 1), ids


def test_other_ids_and_other_chats_are_counted_and_refused():
    tokenizer, template = tiny_tokenizer(), ChatTemplate()
    texts = [made_up_text(50), "a bad one", ""]
    chats = [[Message("user", "a")], [Message("user", "a"), Message("assistant", "b")]]
    parity = compare_text(tokenizer, template, texts, chats, Text(tokenizer, template))
    assert (parity.texts, parity.unequal_texts) == (3, 1)
    assert (parity.chats, parity.unequal_chats) == (2, 1)
    with pytest.raises(GateError) as refusal:
        check_parity({}, parity, 1e-4)
    assert [line.split(":")[1] for line in str(refusal.value).splitlines()] == [
        " tokenizer",
        " chat template",
    ]


def test_prompts_spread_over_texts():
    texts = [list(range(100)), list(range(200, 203))]
    assert cut_prompts(texts, 5, 10) == [
        list(range(10)),
        [200, 201, 202],
        list(range(45, 55)),
        [200, 201, 202],
        list(range(90, 100)),
    ]


def test_params_refuse_by_name():
    good = {
        "opset": 20,
        "onnx_int8": True,
        "onnx_fp16": True,
        "onnx_static": None,
        "static_chunk": 8,
        "gguf": ("f32",),
        "prompts": 3,
        "prompt_tokens": 8,
        "greedy_tokens": 8,
    }
    ExportParams(**good, max_logit_diff=1e-4)
    with pytest.raises(ValueError, match="opset: 12"):
        ExportParams(**{**good, "opset": 12}, max_logit_diff=1e-4)
    with pytest.raises(ValueError, match=r"prompts: .*\nmax_logit_diff: "):
        ExportParams(**{**good, "prompts": 0}, max_logit_diff=0.0)
