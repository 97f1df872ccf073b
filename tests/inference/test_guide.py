"""Random logits under a guide write valid JSON of the schema, whatever they are."""

import json

import pytest
import torch
from tiny_dirs import write_model_dir

from tinyllm.errors import DataError
from tinyllm.inference.batching import Engine, Request
from tinyllm.inference.conversation import stop_ids
from tinyllm.inference.guide import Guides
from tinyllm.inference.sampling import SamplingParams
from tinyllm.inference.session import open_session
from tinyllm.quantization.load import load_any_model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["merry", "grim"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    directory = write_model_dir(tmp_path_factory.mktemp("models") / "tiny", max_seq_len=512)
    return open_session(directory, load_any_model, torch.device("cpu"))


def answer(session, *requests):
    engine = Engine(
        session.model,
        stop_ids(session.tokenizer),
        n_slots=len(requests),
        chunk_tokens=64,
        max_waiting=4,
    )
    for request in requests:
        engine.submit(request)
    while not engine.is_idle:
        engine.step()
    return [session.tokenizer.decode(r.ids[len(r.prompt_ids) :]) for r in requests]


def request(session, *, schema=PERSON, seed=0, temperature=1.0):
    guides = Guides(session.tokenizer, stop_ids(session.tokenizer))
    return Request(
        prompt_ids=session.tokenizer.encode("Who is there?"),
        sampling=SamplingParams(temperature=temperature, seed=seed, max_new_tokens=300),
        guide=None if schema is None else guides.make(schema),
    )


@pytest.mark.parametrize("seed", range(8))
def test_an_answer_is_json_of_the_schema(session, seed):
    wanted = request(session, seed=seed, temperature=1.0 if seed else 0.0)
    person = json.loads(answer(session, wanted)[0])
    assert wanted.reason == "stop"
    assert list(person) == ["name", "age", "mood"]
    assert isinstance(person["name"], str)
    assert len(person["name"]) <= 6
    assert type(person["age"]) is int
    assert 0 <= person["age"] <= 150
    assert person["mood"] in ("merry", "grim")


def test_others_in_the_batch_are_not_guided(session):
    free = request(session, schema=None, seed=3)
    alone = answer(session, request(session, schema=None, seed=3))[0]
    guided, together = answer(session, request(session, seed=1), free)
    json.loads(guided)
    assert together == alone


@pytest.mark.parametrize("schema", [{"type": "banana"}, {"$ref": "#/nowhere"}])
def test_an_impossible_schema_is_refused_in_one_line(session, schema):
    with pytest.raises(DataError, match=r"^the schema cannot be used: .+$"):
        request(session, schema=schema)
