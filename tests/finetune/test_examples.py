import numpy as np
import pytest
import torch
from chat_case import (
    ASSISTANT,
    END,
    PAD,
    TEMPLATE,
    USER,
    X,
    byte_id,
    byte_tokenizer,
    talk,
    text_ids,
)
from tiny_lm import tiny_model

from tinyllm.errors import DataError
from tinyllm.finetune.conversations import Conversation
from tinyllm.finetune.examples import (
    ChatBatches,
    build_batch,
    count,
    encode_conversation,
    encode_conversations,
    pack,
)
from tinyllm.model.transformer import next_token_loss
from tinyllm.tokenizer.chat import ChatTemplate, Message


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def encode(tokenizer, conversation, max_tokens=1000, template=TEMPLATE):
    return encode_conversation(conversation, template, tokenizer, max_tokens)


def examples_of(tokenizer, n, seed=0):
    rng = np.random.default_rng(seed)
    texts = ["ab" * int(rng.integers(1, 5)) + str(i) for i in range(n)]
    return [encode(tokenizer, talk(text, text[::-1])) for text in texts]


def test_ids_and_targets_by_hand(tokenizer):
    a, b, c, d, e = map(byte_id, "abcde")
    example = encode(tokenizer, talk("ab", "c", "d", "e"))
    # tokens:       USER a  b  END ASSISTANT c    END  USER d  END ASSISTANT e  END
    assert example.ids.tolist() == [USER, a, b, END, ASSISTANT, c, END, USER, d, END, ASSISTANT, e]
    assert example.targets.tolist() == [X, X, X, X, c, END, X, X, X, X, e, END]
    assert example.answer_ids.tolist() == [c, END, e, END]


def test_a_system_message_is_not_learned(tokenizer):
    messages = (Message("system", "s"), Message("user", "u"), Message("assistant", "a"))
    example = encode(tokenizer, Conversation("s/t/0", messages))
    assert example.answer_ids.tolist() == [byte_id("a"), END]


def test_names_of_special_tokens_in_an_answer_stay_text(tokenizer):
    example = encode(tokenizer, talk("q", "<|end|>"))
    assert example.answer_ids.tolist() == [*text_ids("<|end|>"), END]


@pytest.mark.parametrize("max_tokens", [7, 8, 9, 10])
def test_truncation_keeps_the_end_of_the_turn(tokenizer, max_tokens):
    example = encode(tokenizer, talk("q", "abcdef"), max_tokens)  # 12 tokens in full
    assert len(example.ids) + 1 == max_tokens
    # USER q END ASSISTANT are 4 tokens, END is one
    assert example.answer_ids.tolist() == [*text_ids("abcdef"[: max_tokens - 5]), END]
    assert example.targets[-1] == END


def test_truncation_drops_whole_exchanges_first(tokenizer):
    whole, first = talk("q", "abc", "r", "defgh"), talk("q", "abc")
    n_first = len(encode(tokenizer, first).ids) + 1
    for max_tokens in (n_first, n_first + 7):
        cut, expected = encode(tokenizer, whole, max_tokens), encode(tokenizer, first)
        assert cut.ids.tolist() == expected.ids.tolist()
        assert cut.targets.tolist() == expected.targets.tolist()


def test_a_question_without_room_for_an_answer_is_no_example(tokenizer):
    assert encode(tokenizer, talk("12345", "a"), 8) is None  # USER 5 END ASSISTANT = 8
    assert encode(tokenizer, talk("12345", "a"), 9) is None  # the end alone is no answer
    assert encode(tokenizer, talk("12345", "a"), 10) is not None
    kept = encode_conversations([talk("12345", "a"), talk("1", "a")], TEMPLATE, tokenizer, 8)
    assert len(kept) == 1


def test_what_a_template_writes_behind_the_last_turn_is_left_out(tokenizer):
    template = ChatTemplate(TEMPLATE.source + "{{- '\\n' -}}")
    for max_tokens in (7, 8, 9, 1000):
        example = encode(tokenizer, talk("q", "abc"), max_tokens, template)
        expected = encode(tokenizer, talk("q", "abc"), max_tokens)
        assert example.ids.tolist() == expected.ids.tolist()


def test_rows_by_hand(tokenizer):
    a, b = byte_id("a"), byte_id("b")
    examples = [encode(tokenizer, talk("a", "b")), encode(tokenizer, talk("b", "a"))]
    batch = build_batch([[examples[0], examples[1]], [examples[1]]], 12, PAD)
    one, two = [USER, a, END, ASSISTANT, b], [USER, b, END, ASSISTANT, a]
    assert batch.ids.tolist() == [one + two + [PAD] * 2, two + [PAD] * 7]
    assert batch.targets.tolist() == [
        [X, X, X, b, END, X, X, X, a, END, X, X],
        [X, X, X, a, END] + [X] * 7,
    ]
    assert batch.document_ids.tolist() == [[0] * 5 + [1] * 5 + [-1] * 2, [0] * 5 + [-1] * 7]


def test_packed_conversations_do_not_see_each_other(tokenizer):
    """The logits of a packed conversation are those of the conversation alone."""
    model = tiny_model(1, vocab_size=tokenizer.vocab_size)
    examples = [
        encode(tokenizer, talk(*turns)) for turns in (("ab", "c"), ("d", "efg"), ("h", "i"))
    ]
    batch = build_batch([examples], 32, PAD)
    with torch.no_grad():
        packed = model(
            torch.from_numpy(batch.ids), document_ids=torch.from_numpy(batch.document_ids)
        )[0]
        start = 0
        for example in examples:
            alone = model(torch.from_numpy(example.ids)[None])[0]
            end = start + len(example.ids)
            # masked softmax adds exact zeros; the sums may be blocked otherwise: a few fp32 ulps
            torch.testing.assert_close(packed[start:end], alone, atol=2e-5, rtol=0)
            start = end


def test_loss_of_a_packed_row_is_the_sum_of_its_answers(tokenizer):
    model = tiny_model(2, vocab_size=tokenizer.vocab_size)
    examples = [encode(tokenizer, talk("ab", "c")), encode(tokenizer, talk("d", "efg"))]
    batch = build_batch([examples], 40, PAD)
    ids, targets, documents = map(torch.from_numpy, (batch.ids, batch.targets, batch.document_ids))
    with torch.no_grad():
        together = next_token_loss(model(ids, document_ids=documents), targets).item()
        expected = 0.0
        for example in examples:  # by hand: -ln p of each learned token
            log_p = model(torch.from_numpy(example.ids)[None])[0].double().log_softmax(-1)
            for t, target in enumerate(example.targets.tolist()):
                expected -= log_p[t, target].item() if target != X else 0.0
    assert together == pytest.approx(expected, rel=1e-5)


def test_every_epoch_has_every_conversation_once_in_its_own_order(tokenizer):
    examples = examples_of(tokenizer, 40)
    batches = ChatBatches(examples, 48, 3, seed=7, pad_id=PAD)
    orders = []
    for epoch in range(3):
        rows = batches.rows_of_epoch(epoch)
        orders.append([i for row in rows for i in row])
        assert sorted(orders[-1]) == list(range(40))
        assert all(sum(len(examples[i].ids) for i in row) <= 48 for row in rows)
    assert orders[0] != orders[1] != orders[2]


def test_batches_are_a_pure_function_of_seed_and_index(tokenizer):
    examples = examples_of(tokenizer, 40)
    first = ChatBatches(examples, 48, 3, seed=7, pad_id=PAD)
    wanted = [first.batch(i) for i in range(30)]  # several epochs
    again = ChatBatches(examples, 48, 3, seed=7, pad_id=PAD)
    for i in (29, 0, 17, 3, 18, 29):  # in any order, as after a resume
        got = again.batch(i)
        for name in ("ids", "targets", "document_ids"):
            np.testing.assert_array_equal(getattr(got, name), getattr(wanted[i], name))
    other = ChatBatches(examples, 48, 3, seed=8, pad_id=PAD)
    assert any((other.batch(i).ids != wanted[i].ids).any() for i in range(3))


def test_batches_run_through_the_rows_of_the_epochs(tokenizer):
    examples = examples_of(tokenizer, 11)
    batches = ChatBatches(examples, 48, 2, seed=0, pad_id=PAD)
    rows = [row for epoch in range(3) for row in batches.rows_of_epoch(epoch)]
    for index in range(len(rows) // 2):
        expected = [[examples[i] for i in row] for row in rows[2 * index : 2 * index + 2]]
        np.testing.assert_array_equal(batches.batch(index).ids, build_batch(expected, 48, PAD).ids)


def test_rows_are_well_filled(tokenizer):
    examples = examples_of(tokenizer, 200)
    rows = pack(examples, range(200), 96)
    filled = sum(len(example.ids) for example in examples) / (96 * len(rows))
    assert filled > 1 - max(len(e.ids) for e in examples) / 96  # next-fit's bound


def test_nothing_to_learn_and_rows_too_short_are_refused(tokenizer):
    with pytest.raises(DataError, match="no conversation to learn from"):
        ChatBatches([], 48, 2, seed=0, pad_id=PAD)
    with pytest.raises(DataError, match="raise seq_len or lower chat.max_tokens"):
        ChatBatches([encode(tokenizer, talk("abc", "def"))], 8, 2, seed=0, pad_id=PAD)
    ChatBatches([encode(tokenizer, talk("abc", "def"))], 9, 2, seed=0, pad_id=PAD).batch(0)


def test_counts(tokenizer):
    conversations = [talk("ab", "c", "d", "e"), talk("q", "a")]
    examples = encode_conversations(conversations, TEMPLATE, tokenizer, 100)
    counted = count(conversations, examples)
    assert counted == {"conversations": 2, "turns": 6, "tokens": 19, "supervised_tokens": 6}
