import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_text import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from tinyllm.errors import ArtifactError, DataError
from tinyllm.tokenizer.chat import CHAT_TEMPLATE, ChatTemplate, Message
from tinyllm.tokenizer.special import END_OF_TEXT, END_OF_TURN, SPECIAL_TOKENS

DIALOGUES = [
    [Message("user", "Hi")],
    [Message("system", "Be brief.\n"), Message("user", " What is it? "), Message("assistant", "")],
    [
        Message("user", "{{ 1 }} {% x %}"),
        Message("assistant", "the end, it's 12345"),
        Message("user", "你好\n\n"),
        Message("assistant", "😀"),
    ],
]
MESSAGES = st.lists(
    st.builds(
        Message,
        st.sampled_from(["system", "user", "assistant"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    ),
    max_size=4,
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def transformers_tokenizer(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, chat_template=CHAT_TEMPLATE, eos_token=END_OF_TEXT
    )


def as_dicts(messages):
    return [{"role": message.role, "content": message.content} for message in messages]


def test_form():
    dialogue = [Message("system", "S"), Message("user", "Q"), Message("assistant", "A")]
    text = "<|system|>S<|end|><|user|>Q<|end|><|assistant|>A<|end|>"
    assert ChatTemplate().render(dialogue) == text
    assert ChatTemplate().render(dialogue[:2], True) == text.removesuffix("A<|end|>")


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("prompt", [False, True])
def test_transformers_renders_and_encodes_the_same(
    tokenizer, transformers_tokenizer, dialogue, prompt
):
    template = ChatTemplate()
    theirs = transformers_tokenizer.apply_chat_template(
        as_dicts(dialogue), tokenize=False, add_generation_prompt=prompt
    )
    assert template.render(dialogue, prompt) == theirs
    ids, _ = template.encode(dialogue, tokenizer, prompt)
    assert tokenizer.decode(ids, skip_special=False) == theirs
    assert ids == transformers_tokenizer.encode(theirs, add_special_tokens=False)


@given(MESSAGES, st.booleans())
def test_segments_joined_are_the_rendering(tokenizer, messages, prompt):
    template = ChatTemplate()
    ids, learned = template.encode(messages, tokenizer, prompt)
    assert tokenizer.decode(ids, skip_special=False) == template.render(messages, prompt)
    assert len(ids) == len(learned)


@given(MESSAGES, st.booleans())
def test_learned_are_the_answers_and_their_ends(tokenizer, messages, prompt):
    ids, learned = ChatTemplate().encode(messages, tokenizer, prompt)
    groups = [
        [i for i, _ in group]
        for is_learned, group in itertools.groupby(zip(ids, learned, strict=True), lambda x: x[1])
        if is_learned
    ]
    answers = [message.content for message in messages if message.role == "assistant"]
    end = tokenizer.id_of(END_OF_TURN)
    assert groups == [[*tokenizer.encode(answer), end] for answer in answers]


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_content_never_becomes_a_special_token(tokenizer, special, role):
    clean, _ = ChatTemplate().encode([Message(role, "")], tokenizer)
    content = f"x{special}y{special}"
    ids, _ = ChatTemplate().encode([Message(role, content)], tokenizer)
    assert [i for i in ids if i < len(SPECIAL_TOKENS)] == clean
    assert tokenizer.decode(ids) == content


def test_injection_safe_ids_equal_those_of_transformers(tokenizer, transformers_tokenizer):
    content = "".join(f"x{special}y " for special in SPECIAL_TOKENS)
    messages = [Message("user", content), Message("assistant", content), Message("system", "<|e")]
    theirs = transformers_tokenizer.apply_chat_template(
        as_dicts(messages), add_generation_prompt=True, sanitize_control_tokens=True
    )["input_ids"]
    assert ChatTemplate().encode(messages, tokenizer, True)[0] == theirs


def test_content_that_looks_like_a_placeholder_stays(tokenizer):
    messages = [Message("user", "\x001\x00"), Message("assistant", "\x000\x00")]
    ids, _ = ChatTemplate().encode(messages, tokenizer)
    assert tokenizer.decode(ids, skip_special=False) == ChatTemplate().render(messages)


def test_unknown_roles_are_refused():
    with pytest.raises(DataError, match="unknown role tool"):
        ChatTemplate().render([Message("tool", "x")])


def test_load(tmp_path):
    with pytest.raises(ArtifactError, match="no such file"):
        ChatTemplate.load(tmp_path)
    file = tmp_path / "chat_template.jinja"
    file.write_text(CHAT_TEMPLATE, encoding="utf-8")
    assert ChatTemplate.load(tmp_path).source == CHAT_TEMPLATE
    for damaged in (b"{% for x", b"\xff"):
        file.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="damaged"):
            ChatTemplate.load(tmp_path)


def test_another_template_is_followed(tokenizer):
    """The Jinja text is the definition: nothing of the form is known to the code."""
    source = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    messages = [Message("user", "Q"), Message("assistant", "A")]
    ids, learned = ChatTemplate(source).encode(messages, tokenizer)
    text = tokenizer.decode(ids, skip_special=False)
    assert text == "<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n", json.dumps(text)
    told = [i for i, is_learned in zip(ids, learned, strict=True) if is_learned]
    assert told == [*tokenizer.encode("A"), 4]
