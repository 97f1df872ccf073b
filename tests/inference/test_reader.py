"""A reader's logits are those of the whole text at once, whatever its parts and its way."""

import pytest
import torch
from tiny_lm import VOCAB, tiny_model

from tinyllm.errors import DataError
from tinyllm.inference.cache import KVCache
from tinyllm.inference.reader import Reader
from tinyllm.ops import cpu
from tinyllm.ops.decoder import SequenceDecoder
from tinyllm.quantization.int8 import quantize_model

IDS = torch.randint(VOCAB, (20,), generator=torch.Generator().manual_seed(3)).tolist()
PARTS = ((0, 6), (6, 7), (7, 8), (8, 15), (15, 20))
MODELS = {"fp32": tiny_model, "int8": lambda: quantize_model(tiny_model())}


def reader_of(model, max_len=24):
    return Reader(model, KVCache(model.config, 1, max_len, torch.float32, "cpu"))


def parts(read):
    return torch.cat([read(IDS[start:end]).clone() for start, end in PARTS])


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_whole_text(name):
    model = MODELS[name]()
    read = reader_of(model)
    found = parts(read)
    assert read.cache.length == len(IDS)
    whole = model(torch.tensor([IDS]))[0, [end - 1 for _, end in PARTS]]
    # fp32 rounding; in INT8 a number may also round to the next of 254 steps
    assert (found - whole).norm() / whole.norm() < (1e-5 if name == "fp32" else 5e-3)
    read.cache.truncate(PARTS[0][1])
    assert torch.equal(read(IDS[6:7])[0], found[1])  # forgotten and read again


def test_a_prepared_call_gives_the_bits_of_one_that_is_not():
    if cpu.load()[0] is None:
        pytest.skip("no native kernels here")
    model = quantize_model(tiny_model())
    read = reader_of(model)
    assert isinstance(read._native, SequenceDecoder)
    cache = KVCache(model.config, 1, 24, torch.float32, "cpu")
    with torch.inference_mode():
        each = [model.next_logits(torch.tensor([IDS[a:b]]), cache) for a, b in PARTS]
    assert torch.equal(parts(read), torch.cat(each))
    for mine, other in zip(read.cache.memory(), cache.memory(), strict=True):
        assert all(torch.equal(x.numbers, y.numbers) for x, y in zip(mine, other, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_full_cache_is_refused(name):
    read = reader_of(MODELS[name](), max_len=4)
    read(IDS[:4])
    for more in (IDS[4:5], IDS[4:9]):
        with pytest.raises(DataError, match="do not fit into a cache of 4"):
            read(more)
    read.cache.truncate(3)
    assert read(IDS[3:4]).isfinite().all()


def test_what_the_library_must_not_see_is_refused():
    if cpu.load()[0] is None:
        pytest.skip("no native kernels here")
    read = reader_of(quantize_model(tiny_model()), max_len=8)
    for ids, start in ((IDS[:1], 8), (IDS[:3], 6), ([], 0)):
        with pytest.raises(IndexError, match="do not fit"):
            read._native.logits(ids, start)
    for token in (VOCAB, -1):
        with pytest.raises(IndexError, match=f"not one of {VOCAB}"):
            read._native.logits([token], 0)
