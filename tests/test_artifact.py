import json

import pytest

from tinyllm.artifact import (
    build_artifact,
    load_manifest,
    merge_lineage,
    verify_files,
    write_json,
    write_text,
)
from tinyllm.errors import ArtifactError, LineageError


def make(folder, kind, made_from=(), text="x", **options):
    with build_artifact(folder, kind=kind, made_from=list(made_from), **options) as draft:
        (draft.path / "a.txt").write_text(text)
        (draft.path / "sub").mkdir()
        (draft.path / "sub/b.txt").write_text(text)
    return folder


def test_lineage_reaches_every_ancestor(tmp_path):
    raw = make(tmp_path / "raw", "raw")
    clean = make(tmp_path / "clean", "clean", [raw])
    tokens = make(tmp_path / "tokens", "tokens", [clean])
    lineage = load_manifest(tokens).lineage
    assert lineage == {"raw": load_manifest(raw).digest, "clean": load_manifest(clean).digest}


def test_equal_inputs_give_equal_bytes(tmp_path):
    for name in ("one", "two"):
        make(tmp_path / name, "raw", config={"b": 1, "a": [2]})
    first, second = ((tmp_path / name / "manifest.json").read_bytes() for name in ("one", "two"))
    assert first == second


def test_inputs_of_different_ancestry_are_refused_with_both_digests(tmp_path):
    one, two = make(tmp_path / "r1", "raw", text="1"), make(tmp_path / "r2", "raw", text="2")
    a, b = make(tmp_path / "a", "clean", [one]), make(tmp_path / "b", "tokenizer", [two])
    with pytest.raises(LineageError) as caught:
        merge_lineage([a, b])
    message = str(caught.value)
    assert load_manifest(one).digest[:12] in message
    assert load_manifest(two).digest[:12] in message
    assert "raw" in message


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda d: (d / "a.txt").write_text("y"), "a.txt"),
        (lambda d: (d / "sub/b.txt").unlink(), "b.txt"),
        (lambda d: (d / "new.txt").write_text("y"), "new.txt"),
    ],
)
def test_a_changed_file_is_named(tmp_path, damage, named):
    folder = make(tmp_path / "a", "raw")
    verify_files(folder, load_manifest(folder))
    damage(folder)
    with pytest.raises(ArtifactError, match=named):
        verify_files(folder, load_manifest(folder))


def test_an_edited_manifest_is_refused(tmp_path):
    path = make(tmp_path / "a", "raw") / "manifest.json"
    document = json.loads(path.read_text())
    document["info"]["n"] = 1
    path.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="its own digest"):
        load_manifest(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_manifest_is_one_line(tmp_path, text):
    folder = make(tmp_path / "a", "raw")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="damaged"):
        load_manifest(folder)


def test_another_kind_or_no_artifact_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no manifest.json"):
        load_manifest(tmp_path)
    with pytest.raises(ArtifactError, match="holds a 'raw' artifact, 'sft' expected"):
        load_manifest(make(tmp_path / "a", "raw"), "sft")


def test_a_failure_leaves_the_old_artifact_and_no_rubbish(tmp_path):
    folder = make(tmp_path / "a", "raw", text="old")
    with (
        pytest.raises(RuntimeError),
        build_artifact(folder, kind="raw", made_from=[]) as draft,
    ):
        (draft.path / "a.txt").write_text("half")
        raise RuntimeError
    assert (folder / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_rebuilt_artifact_replaces_the_old_one_whole(tmp_path):
    folder = make(tmp_path / "a", "raw")
    with build_artifact(folder, kind="raw", made_from=[]) as draft:
        (draft.path / "only.txt").write_text("new")
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "only.txt"]


def test_write_text_breaks_hard_links(tmp_path):
    # DVC may link an output to its cache: writing through the link would damage the cache
    cached, out = tmp_path / "cached", tmp_path / "out"
    cached.write_text("cached")
    out.hardlink_to(cached)
    write_text(out, "new")
    assert cached.read_text() == "cached"


def test_json_is_text_for_dvc_whatever_is_in_it(tmp_path):
    from dvc_data.hashfile.istextfile import istextfile
    from dvc_objects.fs.local import LocalFileSystem

    value = [{"text": "\ufffd\u4e16\x7f" * 50}]
    write_json(tmp_path / "a.json", value)
    assert istextfile(str(tmp_path / "a.json"), LocalFileSystem())
    assert json.loads((tmp_path / "a.json").read_text()) == value
