import json
from collections import Counter

import pytest

from tinyllm.corpus.sources import FileSource
from tinyllm.errors import DataError
from tinyllm.finetune.reading import drop_duplicates, read_conversations

CHATTERBOT = b"""
categories: [test]
conversations:
- - What year?
  - 1963
- - Hello
  - Yes
  - How are you?
- - '  Caf\xc3\xa9 or cafe\xcc\x81?  '
  - "both\\n\\n"
- In a game of bingo
- - Alone
- - Q
  - ''
  - lost
"""


def read(content, *, form="yaml", name="dir/topic.yml", alternatives=(), dropped=None):
    source = FileSource(
        kind="file",
        path="x",
        sha256=None,
        format=form,
        members=None,
        encoding="utf-8",
        text_field=None,
    )
    dropped = Counter() if dropped is None else dropped
    return list(read_conversations("src", source, [(name, content)], alternatives, dropped))


def turns(conversation):
    return [(message.role, message.content) for message in conversation.messages]


def jsonl(*messages):
    rows = [{"role": role, "content": content} for role, content in messages]
    return json.dumps({"messages": rows}).encode() + b"\n"


def test_chatterbot_form():
    dropped = Counter()
    found = read(CHATTERBOT, dropped=dropped)
    assert [c.name for c in found] == [f"src/topic/{i:06d}" for i in range(3)]
    assert turns(found[0]) == [("user", "What year?"), ("assistant", "1963")]  # text, not a number
    assert turns(found[1]) == [("user", "Hello"), ("assistant", "Yes")]  # text; no answer follows
    assert turns(found[2]) == [("user", "Café or café?"), ("assistant", "both")]
    assert dropped == {"malformed": 1, "no_answer": 2}


def test_alternative_answers_are_paired_with_the_question():
    found = read(b"conversations: [[Q, a, b, c]]", alternatives=["topic"])
    assert [turns(c) for c in found] == [[("user", "Q"), ("assistant", x)] for x in "abc"]
    (dialogue,) = read(b"conversations: [[Q, a, b, c]]", alternatives=["other"])
    assert len(dialogue.messages) == 4


def test_jsonl_form_with_a_system_message():
    line = jsonl(("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "thanks"))
    (found,) = read(line + b"\n", form="jsonl", name="my.chats.jsonl")
    assert turns(found) == [("system", "S"), ("user", "Q"), ("assistant", "A")]
    assert found.topics == ("src", "my")
    assert found.question == "Q"


def test_line_separators_inside_json_text_do_not_cut_a_line():
    line = jsonl(("user", "a?b"), ("assistant", "c")).replace(b"?", "\u2028".encode())
    (found,) = read(line, form="jsonl")
    assert found.question == "a\u2028b"


def test_lone_surrogates_become_the_replacement_character():
    line = jsonl(("user", "\ud800"), ("assistant", "c"))  # as the JSON escape \\ud800
    (found,) = read(line, form="jsonl")
    assert found.question == "\ufffd"


@pytest.mark.parametrize(
    ("content", "form", "message"),
    [
        (jsonl(("user", "a"), ("user", "b")), "jsonl", "topic.yml:1: message 2 is 'user', 'assis"),
        (
            jsonl(
                ("assistant", "a"),
            ),
            "jsonl",
            "message 1 is 'assistant', 'user' expected",
        ),
        (jsonl(("system", "a"), ("assistant", "b")), "jsonl", "message 2 is 'assistant', 'user'"),
        (jsonl(("user", "a"), ("system", "b")), "jsonl", "message 2 is 'system'"),
        (jsonl(("asistant", "a")), "jsonl", "did you mean assistant?"),
        (jsonl(("bot", "a")), "jsonl", "role 'bot' is not one of assistant, system, user"),
        (jsonl(("user", 3)), "jsonl", "content is int, not text"),
        (b"\n{nonsense\n", "jsonl", "topic.yml:2: expected {"),
        (b'{"messages": ["hi"]}', "jsonl", "expected {"),
        (b"[1]", "jsonl", "expected {"),
        (b"\xff", "jsonl", "not utf-8"),
        (b"a: [", "yaml", "not readable as YAML"),
        (b"- a\n- b", "yaml", "has no list `conversations`"),
        (b"conversations: 3", "yaml", "has no list `conversations`"),
    ],
)
def test_bad_input_is_told_in_one_line(content, form, message):
    with pytest.raises(DataError) as error:
        read(content, form=form)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_duplicates_are_dropped_and_counted():
    dropped = Counter()
    found = read(b"conversations: [[Q, a], ['Q ', a], [Q, b], [Q, a, Q, a]]")
    kept = list(drop_duplicates(found, dropped))
    assert [len(c.messages) for c in kept] == [2, 2, 4]
    assert dropped == {"duplicate": 1}
