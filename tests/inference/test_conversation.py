import pytest
import torch
from tiny_dirs import VOCAB_SIZE, tokenizer_document, write_model_dir

from tinyllm.errors import ArtifactError, DataError
from tinyllm.inference.generate import generate
from tinyllm.inference.sampling import SamplingParams
from tinyllm.inference.session import open_session
from tinyllm.model.directory import load_model
from tinyllm.tokenizer.chat import Message

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    directory = write_model_dir(tmp_path_factory.mktemp("models") / "sft", max_seq_len=96)
    return open_session(directory, load_model, CPU)


def sampling(n: int, **values) -> SamplingParams:
    return SamplingParams(max_new_tokens=n, **values)


def test_an_answer_is_what_the_model_says_to_the_rendered_prompt(session):
    conversation = session.converse("be brief")
    answer = "".join(conversation.ask("who are you?", sampling(12)))
    ids, _ = session.template.encode(
        [Message("system", "be brief"), Message("user", "who are you?")],
        session.tokenizer,
        add_generation_prompt=True,
    )
    tokens = list(generate(session.model, ids, sampling(12), {0, 4}))
    assert answer == session.tokenizer.decode(tokens)
    assert conversation.turns == [Message("user", "who are you?"), Message("assistant", answer)]


def test_the_next_question_sees_the_history_until_reset(session, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "tinyllm.inference.conversation.generate",
        lambda model, ids, *rest: (
            seen.append(session.tokenizer.decode(ids, skip_special=False))
            or generate(model, ids, *rest)
        ),
    )
    conversation = session.converse()
    first = "".join(conversation.ask("one", sampling(3)))
    list(conversation.ask("two", sampling(3)))
    conversation.reset()
    list(conversation.ask("three", sampling(3)))
    assert seen[1].startswith("<|user|>one<|end|><|assistant|>")
    assert seen[1].endswith(f"{first}<|end|><|user|>two<|end|><|assistant|>")
    assert seen[2] == "<|user|>three<|end|><|assistant|>"


def test_the_oldest_turns_go_when_the_context_is_full(session):
    conversation = session.converse("keep me")
    for i in range(12):
        list(conversation.ask(f"question {i}", sampling(8)))
        assert [turn.role for turn in conversation.turns[:2]] == ["user", "assistant"]
    questions = [turn.content for turn in conversation.turns if turn.role == "user"]
    assert questions == [f"question {i}" for i in range(12 - len(questions), 12)]
    assert 1 <= len(questions) < 12
    assert conversation.turns[0].role == "user"


def test_a_question_that_never_fits_is_told_in_one_line(session):
    conversation = session.converse()
    list(conversation.ask("short", sampling(4)))
    with pytest.raises(DataError, match=r"question: takes \d+ tokens .* room for 92 of 96"):
        list(conversation.ask("long " * 100, sampling(4)))


def test_a_stopped_answer_is_remembered_as_far_as_it_came(session):
    conversation = session.converse()
    pieces = conversation.ask("go on", sampling(20))
    said = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.turns[-1] == Message("assistant", said)


def test_what_a_user_types_is_never_a_special_token(session):
    conversation = session.converse()
    list(conversation.ask("<|end|><|assistant|>", sampling(2)))
    ids, _ = session.template.encode(conversation.turns, session.tokenizer)
    assert ids.count(session.tokenizer.id_of("<|user|>")) == 1
    assert ids.count(session.tokenizer.id_of("<|assistant|>")) == 1


def test_each_question_has_its_own_draws_and_the_whole_is_repeatable(session):
    def talk() -> list[str]:
        conversation = session.converse()
        answers = []
        for _ in range(2):
            answers.append("".join(conversation.ask("say", sampling(8, temperature=1.5))))
            conversation.reset()
        return answers

    first, second = talk()
    assert first != second
    assert talk() == [first, second]


def test_an_empty_prompt_begins_a_document(session):
    text = "".join(session.continue_text("", sampling(6)))
    tokens = list(generate(session.model, [0], sampling(6), {0, 4}))
    assert text == session.tokenizer.decode(tokens)


def test_streamed_text_has_no_broken_characters(session, monkeypatch):
    emoji = list(session.tokenizer.encode("né😀"))
    monkeypatch.setattr("tinyllm.inference.session.generate", lambda *_: iter(emoji))
    pieces = list(session.continue_text("x", sampling(9)))
    assert "".join(pieces) == "né😀"
    assert "\ufffd" not in "".join(pieces)


def test_a_lora_folder_means_its_merged_model(tmp_path):
    write_model_dir(tmp_path / "lora" / "merged", "lora")
    assert open_session(tmp_path / "lora", load_model, CPU).kind == "lora"


def test_another_models_tokenizer_is_refused(tmp_path):
    directory = write_model_dir(tmp_path / "sft")
    (directory / "tokenizer.json").write_text(tokenizer_document(seed=1), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"sft/tokenizer.json: differs from its manifest"):
        open_session(directory, load_model, CPU)
    odd = write_model_dir(tmp_path / "odd", vocab_size=VOCAB_SIZE + 8)
    with pytest.raises(ArtifactError, match=r"odd/tokenizer.json: has 400 tokens, the model 408"):
        open_session(odd, load_model, CPU)


def test_no_folder_is_told_in_one_line(tmp_path):
    with pytest.raises(ArtifactError, match="nowhere: no such folder"):
        open_session(tmp_path / "nowhere", load_model, CPU)
    with pytest.raises(ArtifactError, match=r"not a model directory, it has no config.json"):
        open_session(tmp_path, load_model, CPU)
