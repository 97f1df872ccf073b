from pathlib import Path

import pytest
from chat_case import talk

from tinyllm.errors import DataError, ParamsError
from tinyllm.finetune.conversations import load_conversations, write_conversations
from tinyllm.finetune.division import ChatParams, divide, is_held_out
from tinyllm.params import build_params

SOURCE = {
    "kind": "file",
    "path": "x.jsonl",
    "sha256": None,
    "format": "jsonl",
    "members": None,
    "encoding": "utf-8",
    "text_field": None,
}


def chat_params(**changes):
    values = {
        "sources": {"mine": SOURCE},
        "alternative_topics": [],
        "lora_topics": ["humor"],
        "val_share": 0.3,
        "max_tokens": 64,
        **changes,
    }
    return build_params(ChatParams, values, "chat")


def conversations(n=60):
    return [talk(f"Question {i // 2}?", f"answer {i}", name=f"mine/{topic}/{i:06d}")
            for topic in ("humor", "food") for i in range(n)]  # fmt: skip


def test_parts_are_topics_and_every_conversation_is_somewhere_once():
    divided = divide(conversations(), chat_params())
    assert {c.topics[1] for c in divided["lora", "train"] + divided["lora", "val"]} == {"humor"}
    assert {c.topics[1] for c in divided["sft", "train"] + divided["sft", "val"]} == {"food"}
    assert sorted(c.name for part in divided.values() for c in part) == sorted(
        c.name for c in conversations()
    )


def test_a_source_name_is_a_topic_too():
    mixed = [*conversations(), *(talk(f"Q{i}", "a", name=f"other/x/{i}") for i in range(30))]
    divided = divide(mixed, chat_params(lora_topics=["other"]))
    assert {c.topics[0] for c in divided["lora", "train"]} == {"other"}


def test_answers_to_one_question_stay_together_also_across_parts():
    divided = divide(conversations(), chat_params())
    train = {c.question for (_, split), cs in divided.items() if split == "train" for c in cs}
    val = {c.question for (_, split), cs in divided.items() if split == "val" for c in cs}
    assert train
    assert val
    assert not train & val


def test_case_and_punctuation_of_a_question_do_not_matter():
    for i in range(50):
        a, b = talk(f"Who are you, {i}?", "x"), talk(f"who are  you {i}", "y")
        assert is_held_out(a, 0.5) == is_held_out(b, 0.5)
    assert is_held_out(talk("?!", "x"), 0.999999)  # punctuation alone is a question of its own


def test_the_split_does_not_depend_on_what_else_is_there():
    few, many = conversations(40), conversations()
    in_few = {c.name for c in divide(few, chat_params())["sft", "val"]}
    in_many = {c.name for c in divide(many, chat_params())["sft", "val"]}
    assert in_few == in_many & {c.name for c in few}


def test_the_share_is_about_what_was_asked_for():
    held_out = sum(is_held_out(talk(f"question {i}", "a"), 0.1) for i in range(3000))
    assert abs(held_out - 300) < 5 * (3000 * 0.1 * 0.9) ** 0.5  # five standard deviations


@pytest.mark.parametrize(
    ("changes", "n", "message"),
    [
        ({"lora_topics": ["humour"]}, 60, "chat.lora_topics: no conversations of 'humour'; did"),
        ({"lora_topics": ["humour"]}, 60, "did you mean humor?"),
        ({"alternative_topics": ["zzz"]}, 60, "chat.alternative_topics: no conversations of"),
        ({"alternative_topics": ["zzz"]}, 60, "there are food, humor, mine"),
        (
            {"val_share": 1e-9},
            60,
            "no val conversations for sft, which has 60 in all; change chat.v",
        ),
        ({"lora_topics": ["mine"]}, 60, "no train conversations for sft, which has 0 in all;"),
        ({}, 0, "chat: no conversation with an answer in chat.sources"),
    ],
)
def test_empty_parts_are_refused(changes, n, message):
    with pytest.raises(DataError) as error:
        divide(conversations(n), chat_params(**changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_share": 0.0}, "val_share: a share above 0 and below 1"),
        ({"val_share": 1.0}, "val_share: a share above 0 and below 1"),
        ({"max_tokens": 3}, "max_tokens: must be at least 8"),
        ({"lora_topics": []}, "lora_topics: empty"),
        ({"sources": {}}, "sources: empty"),
        ({"sources": {"a/b": SOURCE}}, "sources.a/b: use letters"),
        ({"sources": {"a": {**SOURCE, "format": "txt"}}}, "sources.a.format: 'txt' has no conv"),
    ],
)
def test_refused_parameters(changes, message):
    with pytest.raises(ParamsError) as error:
        chat_params(**changes)
    assert message in str(error.value)


def test_files_come_back_as_written(tmp_path: Path):
    written = [talk("a\u2028b\n{%", "😀", name="s/t/0"), talk("c", "d", "e", "f", name="s/t/1")]
    path = tmp_path / "sft" / "val.jsonl"
    write_conversations(path, written)
    assert load_conversations(path) == written
    assert path.read_bytes().count(b"\n") == 2


def test_missing_and_damaged_files(tmp_path: Path):
    path = tmp_path / "val.jsonl"
    with pytest.raises(DataError, match="no such file"):
        load_conversations(path)
    for damaged in ('{"name": "x"', '{"name": "x"}', '{"name": "x", "messages": [{"a": 1}]}'):
        path.write_text(damaged)
        with pytest.raises(DataError, match="damaged"):
            load_conversations(path)
