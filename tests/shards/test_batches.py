import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm.errors import DataError
from tinyllm.shards.batches import StreamBatches, document_ids
from tinyllm.shards.stream import TokenStream


def numbered_stream(*lengths: int) -> TokenStream:
    """Shards of consecutive numbers, so that a token tells where it stands; 1000 apart."""
    return TokenStream(
        [np.arange(length, dtype=np.uint32) + 1000 * i for i, length in enumerate(lengths)]
    )


def windows_of(batches: StreamBatches, batch_size: int, first: int, last: int) -> list[list[int]]:
    """Windows `first` to `last` of the run, with the token to predict last."""
    windows = []
    for index in range(first // batch_size, -(-last // batch_size)):
        batch = batches.batch(index)
        windows += np.concatenate([batch.ids, batch.targets[:, -1:]], axis=1).tolist()
    return windows[first % batch_size :][: last - first]


def test_form_of_a_batch():
    batch = StreamBatches(numbered_stream(100), seq_len=8, batch_size=3, seed=0).batch(0)
    for array in (batch.ids, batch.targets):
        assert array.shape == (3, 8)
        assert array.dtype == np.int64
        assert array.flags.c_contiguous
        assert array.flags.writeable
    assert (batch.targets == batch.ids + 1).all()
    assert batch.document_ids is None


def test_documents_are_told_apart_by_the_token_that_ends_them():
    tokens = np.array([5, 6, 0, 7, 0, 8, 9, 9, 0, 4], np.uint16)
    assert document_ids(tokens[None], 0).tolist() == [[0, 0, 1, 1, 2, 2, 2, 2, 3, 3]]
    apart, together = (
        StreamBatches(TokenStream([np.tile(tokens, 9)]), 8, 3, 0, end) for end in (0, None)
    )
    for index in range(5):
        batch, plain = apart.batch(index), together.batch(index)
        assert (batch.ids == plain.ids).all()
        assert (batch.targets == plain.targets).all()
        for row, documents in zip(batch.ids, batch.document_ids, strict=True):
            assert np.diff(documents, prepend=0).tolist() == (row == 0).astype(int).tolist()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    seq_len=st.integers(1, 12),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_an_epoch_predicts_every_token_once(lengths, seq_len, batch_size, seed):
    stream = numbered_stream(*lengths)
    if max(lengths) <= seq_len:
        with pytest.raises(DataError):
            StreamBatches(stream, seq_len, batch_size, seed)
        return
    batches, first = StreamBatches(stream, seq_len, batch_size, seed), 0
    for epoch in range(4):
        n_windows = batches.windows_in_epoch(epoch)
        assert n_windows >= 1
        windows = windows_of(batches, batch_size, first, first + n_windows)
        for window in windows:
            assert np.diff(window).tolist() == [1] * seq_len  # in order, within one shard
        predicted = sorted(token for window in windows for token in window[1:])
        assert len(set(predicted)) == len(predicted)
        for i, length in enumerate(lengths):
            of_shard = [token for token in predicted if token // 1000 == i]
            if of_shard:  # gapless; what is left out at each end is shorter than a window
                assert of_shard == list(range(of_shard[0], of_shard[-1] + 1))
                assert of_shard[0] - 1000 * i <= seq_len
                assert 1000 * i + length - 1 - of_shard[-1] < seq_len
            else:
                assert length <= 2 * seq_len
        first += n_windows


def test_epochs_differ_in_order_and_in_where_they_cut():
    batches = StreamBatches(numbered_stream(500), seq_len=10, batch_size=1, seed=5)
    epochs, first = [], 0
    for epoch in range(6):
        n_windows = batches.windows_in_epoch(epoch)
        epochs.append(
            [w[0] for w in windows_of(batches, 1, first, first + n_windows)],
        )
        first += n_windows
    offsets = [min(starts) for starts in epochs]
    assert max(offsets) < 10
    assert len(set(offsets)) >= 3
    assert all(starts != sorted(starts) for starts in epochs)
    relative = [
        [start - offset for start in starts] for starts, offset in zip(epochs, offsets, strict=True)
    ]
    assert all(a != b for a, b in itertools.combinations(relative, 2))


def test_any_index_can_be_asked_for_directly():
    def fresh() -> StreamBatches:
        return StreamBatches(numbered_stream(200, 77), seq_len=7, batch_size=4, seed=11)

    in_order = fresh()
    expected = [in_order.batch(i) for i in range(60)]
    backwards = fresh()
    for index in (59, 3, 30, 58, 0, 31):
        for batches in (fresh(), backwards):
            batch = batches.batch(index)
            assert (batch.ids == expected[index].ids).all()
            assert (batch.targets == expected[index].targets).all()


def test_order_is_pinned():
    """A changed order would break resuming of runs that are under way."""
    batches = StreamBatches(numbered_stream(60), seq_len=8, batch_size=4, seed=1337)
    assert batches.batch(0).ids[:, 0].tolist() == [20, 36, 4, 12]
    assert batches.batch(5).ids[:, 0].tolist() == [29, 45, 13, 21]


def test_seeds_differ():
    stream = numbered_stream(500)
    first, second = (StreamBatches(stream, 8, 8, seed).batch(0) for seed in (0, 1))
    assert (first.ids != second.ids).any()


@pytest.mark.parametrize("lengths", [(), (0,), (8,), (8, 8, 8)])
def test_a_sequence_longer_than_every_shard_is_refused(lengths):
    with pytest.raises(DataError, match="lower seq_len") as caught:
        StreamBatches(numbered_stream(*lengths), seq_len=8, batch_size=1, seed=0)
    assert "\n" not in str(caught.value)


def test_one_window_is_enough():
    batches = StreamBatches(numbered_stream(9), seq_len=8, batch_size=3, seed=0)
    assert batches.batch(7).ids.tolist() == [list(range(8))] * 3


def test_more_than_five_million_tokens_per_second():
    tokens = np.arange(4_000_000, dtype=np.uint32).astype(np.uint16)
    batches = StreamBatches(TokenStream([tokens]), seq_len=256, batch_size=8, seed=0)
    batches.batch(0)
    started_s = time.process_time()  # of this process: other work on the machine does not count
    for index in range(300):
        batches.batch(index)
    assert 300 * 8 * 256 / (time.process_time() - started_s) > 5e6


@given(st.lists(st.integers(0, 9), max_size=5), st.integers(0, 50), st.integers(0, 50))
def test_stream_reads_across_shards(lengths, start, stop):
    stream = numbered_stream(*lengths)
    everything = [1000 * i + j for i, length in enumerate(lengths) for j in range(length)]
    assert len(stream) == len(everything)
    read = stream.read(start, stop)
    assert read.dtype == np.int64
    assert read.tolist() == everything[start:stop]
