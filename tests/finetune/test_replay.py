"""Rows of pretraining text below the dialogues."""

import numpy as np
import pytest
from chat_case import PAD, TEMPLATE, TRAINING, byte_tokenizer, talk

from tinyllm.finetune.examples import ChatBatches, encode_conversations
from tinyllm.finetune.replay import ChatTrainingParams, ReplayBatches
from tinyllm.shards.batches import StreamBatches
from tinyllm.shards.stream import TokenStream


def sources(seed: int) -> tuple[ChatBatches, StreamBatches]:
    talks = [talk(f"q{i}", f"a{i}") for i in range(9)]
    examples = encode_conversations(talks, TEMPLATE, byte_tokenizer(), 48)
    stream = TokenStream([np.arange(500, dtype=np.uint16) % 200], "text")
    return ChatBatches(examples, 48, 2, seed, PAD), StreamBatches(stream, 48, 1, seed)


def test_a_batch_is_dialogues_and_then_text():
    chat, text = sources(seed=3)
    for index in (0, 7, 1):
        batch = ReplayBatches(*sources(seed=3)).batch(index)
        above, below = chat.batch(index), text.batch(index)
        assert batch.ids.shape == batch.targets.shape == batch.document_ids.shape == (3, 48)
        for name in ("ids", "targets", "document_ids"):
            assert (getattr(batch, name)[:2] == getattr(above, name)).all()
        assert (batch.ids[2:] == below.ids).all()
        assert (batch.targets[2:] == batch.ids[2:] + 1).mean() > 0.95  # every token is learned
        assert (batch.document_ids[2:] == 0).all()


@pytest.mark.parametrize("n_rows", [-1, 2, 5])
def test_dialogues_must_remain(n_rows):
    with pytest.raises(ValueError, match="replay_rows: must be at least 0 and below batch_size"):
        ChatTrainingParams(**TRAINING, replay_rows=n_rows)
    assert ChatTrainingParams(**TRAINING, replay_rows=1).replay_rows == 1
