import random
from dataclasses import replace
from pathlib import Path

import pytest

from tinyllm.corpus.clean import clean_corpus
from tinyllm.corpus.clean_params import CleanParams
from tinyllm.corpus.documents import Document, read_documents, write_documents
from tinyllm.errors import DataError
from tinyllm.params import build_params, read_yaml
from tinyllm.progress import Silent

ROOT = Path(__file__).parents[2]
SHIPPED = build_params(CleanParams, read_yaml(ROOT / "params.yaml")["clean"], "p")
PARAMS = replace(SHIPPED, languages=(), val_documents=("held",))
SENTENCE = "the king and his men have come to that hall of stone with a great cry"


def text(seed, n_words=200):
    rng = random.Random(seed)
    words = ["".join(rng.choices("aeioulmnrst", k=6)) if i % 2 else rng.choice(SENTENCE.split())
             for i in range(n_words)]  # fmt: skip
    return "\n".join(" ".join(words[i : i + 8]) for i in range(0, n_words, 8))


def run(tmp_path, documents, params=PARAMS):
    """Return the names in train and val, and the metrics."""
    number = len(list(tmp_path.iterdir()))
    raw, target = tmp_path / f"raw{number}", tmp_path / f"clean{number}"
    write_documents(raw, [Document(*each) for each in documents])
    target.mkdir()
    metrics = clean_corpus([raw], target, params, len(documents), Silent())
    assert sorted(path.name for path in target.iterdir()) == ["train", "val"]
    splits = ({d.name for d in read_documents(target / split)} for split in ("train", "val"))
    return *splits, metrics


BASE = [("a", text(1)), ("b", text(2)), ("held", text(3))]


def test_split_by_name_and_counts(tmp_path):
    train, val, metrics = run(tmp_path, [*BASE, ("short", "too few words")])
    assert (train, val) == ({"a", "b"}, {"held"})
    assert metrics["documents"] == 4
    assert metrics["documents_dropped"] == 1
    assert metrics["reasons"] == {"short_doc": 1}
    assert metrics["documents_train"] == 2
    assert metrics["documents_val"] == 1
    assert metrics["bytes_val"] == len(text(3))


def test_duplicates_are_counted_by_kind(tmp_path):
    near = text(1).replace("king", "queen", 1)
    documents = [*BASE, ("copy", text(1) + "\n"), ("near", near), ("held-copy", text(3))]
    train, val, metrics = run(tmp_path, documents)
    assert (train, val) == ({"a", "b"}, {"held"})
    assert metrics["exact_duplicates"] == 2
    assert metrics["near_duplicates"] == 1
    assert metrics["leaks_removed"] == 0


def test_no_copy_of_validation_text_stays_in_training(tmp_path):
    leaks = [
        ("1-before", text(3)),
        ("edition", text(3).replace("king", "queen", 1)),
        ("excerpt", "\n".join(text(3).split("\n")[5:20])),
        ("collection", text(4) + "\n" + text(3) + "\n" + text(5)),
    ]
    train, val, metrics = run(tmp_path, [*leaks, *BASE])
    assert (train, val) == ({"a", "b"}, {"held"})
    assert metrics["leaks_removed"] == 4
    assert metrics["reasons"] == {"leak": 4}


def test_hash_split_does_not_depend_on_how_much_there_is(tmp_path):
    params = replace(PARAMS, val_documents=(), val_share=0.2)
    documents = [(f"d{i}", text(i)) for i in range(120)]
    train, val, _ = run(tmp_path, documents, params)
    assert 10 <= len(val) <= 40
    some_train, some_val, _ = run(tmp_path, documents[::-3], params)
    assert some_val <= val
    assert some_train <= train
    renamed = run(tmp_path, [("x" + name, body) for name, body in documents], params)
    assert {name[1:] for name in renamed[1]} == val


def test_the_same_input_gives_the_same_bytes(tmp_path):
    for _ in range(2):
        run(tmp_path, BASE)
    first, second = (sorted((tmp_path / name).rglob("*.jsonl")) for name in ("clean0", "clean2"))
    assert len(first) == 2
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize(
    ("documents", "told"),
    [
        (
            BASE[:2],
            "validation set is empty: of 2 documents none .*(held).*set val_share",
        ),
        (BASE[2:], "no training document is left of 1"),
        ([("a", "x"), ("held", text(3))], "no training document .*dropped: short_doc 1"),
        ([*BASE[:2], ("held", "x")], "validation set is empty.*dropped: short_doc 1"),
        ([("a", text(3)), ("held", text(3))], "no training document .*dropped: leak 1"),
    ],
)
def test_empty_splits_are_refused_in_one_line(tmp_path, documents, told):
    with pytest.raises(DataError, match=told) as info:
        run(tmp_path, documents)
    assert "\n" not in str(info.value)


def test_each_step_of_the_cleaning_is_applied(tmp_path):
    changes = {"scrub_contacts": True, "languages": ("de",)}
    documents = [
        ("held", text(3) + "\nschÃ¶n\nwrite to me@example.org\nenable javascript"),
        *BASE[:2],
    ]
    *_, metrics = run(tmp_path, documents, replace(PARAMS, scrub_contacts=True))
    [document] = read_documents(tmp_path / "clean0" / "val")
    assert document.text == text(3) + "\nschön\nwrite to [email]"
    for name in ("encodings_repaired", "lines_dropped", "contacts_scrubbed"):
        assert metrics[name] == 1
    with pytest.raises(DataError, match="dropped: language 3"):
        run(tmp_path, documents, replace(PARAMS, **changes))
