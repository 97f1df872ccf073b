import gzip
import io
import tarfile
import zipfile

import pytest

from tinyllm.corpus.extract import Limits, extract, read_members
from tinyllm.corpus.sources import FileSource, HuggingfaceSource
from tinyllm.errors import SourceError

FILES = {"p/b.txt": b"second", "p/a.txt": b"first", "p/skip.md": b"no"}


def source(path, members=r"\.txt$", **other):
    reading = {"format": "txt", "encoding": "utf-8", "text_field": None, **other}
    return FileSource(kind="file", path=str(path), sha256=None, members=members, **reading)


def make_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def make_tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


ARCHIVES = [
    ("x.zip", make_zip),
    ("x.whl", make_zip),
    ("x.tgz", make_tar),
    ("x.tar.gz", make_tar),
    ("x.tar", lambda path, files: make_tar(path, files, "w")),
    ("x.tar.xz", lambda path, files: make_tar(path, files, "w:xz")),
]


@pytest.mark.parametrize(("name", "make"), ARCHIVES)
def test_matching_members_come_sorted_by_name(tmp_path, name, make):
    make(tmp_path / name, FILES)
    members = list(read_members(source(tmp_path / name), [tmp_path / name]))
    assert members == [("p/a.txt", b"first"), ("p/b.txt", b"second")]


@pytest.mark.parametrize(("name", "make"), ARCHIVES)
def test_paths_that_lead_outside_are_only_names(tmp_path, name, make):
    make(tmp_path / name, {"../../evil.txt": b"x", "/etc/evil.txt": b"y"})
    before = sorted(tmp_path.parent.rglob("*"))
    names = [name for name, _ in read_members(source(tmp_path / name), [tmp_path / name])]
    assert sorted(names) == ["etc/evil.txt", "evil.txt"]
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_links_and_devices_are_passed_over(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("a.txt", tarfile.SYMTYPE), ("b.txt", tarfile.LNKTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        fifo = tarfile.TarInfo("c.txt")
        fifo.type = tarfile.FIFOTYPE
        archive.addfile(fifo)
    with pytest.raises(SourceError, match="the archive is empty"):
        list(read_members(source(path), [path]))
    link = zipfile.ZipInfo("a.txt")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    make_zip(tmp_path / "x.zip", {link: b"/etc/passwd", "b.txt": b"text"})
    members = read_members(source(tmp_path / "x.zip"), [tmp_path / "x.zip"])
    assert list(members) == [("b.txt", b"text")]


@pytest.mark.parametrize(("name", "make"), ARCHIVES)
@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"members": 2}, "more than 2 entries"),
        ({"member_bytes": 5}, r"p/b.txt unpacks to 6 bytes, the limit is 5"),
        ({"total_bytes": 12}, "unpacks to more than 12 bytes"),
    ],
)
def test_too_large_archives_are_refused(tmp_path, name, make, limits, told):
    make(tmp_path / name, FILES)
    roomy = {"members": 100, "member_bytes": 100, "total_bytes": 100}
    with pytest.raises(SourceError, match=told):
        list(
            read_members(source(tmp_path / name), [tmp_path / name], Limits(**{**roomy, **limits}))
        )


@pytest.mark.parametrize(("name", "make"), ARCHIVES)
def test_corrupt_archives_are_one_line(tmp_path, name, make):
    path = tmp_path / name
    make(path, {"a.txt": bytes(range(256)) * 400, "b.txt": b"b" * 5000})
    whole = path.read_bytes()
    damages = {
        "empty": b"",
        "junk": b"no archive at all" * 50,
        "cut": whole[: len(whole) // 2],
    }
    if not name.endswith(".tar"):  # plain tar has no checksum of its contents; our SHA-256 has
        middle = len(whole) // 3
        damages["flipped"] = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    for damage, content in damages.items():
        path.write_bytes(content)
        with pytest.raises(SourceError, match=name) as info:
            list(read_members(source(path), [path]))
            pytest.fail(f"{damage} was read")
        assert "\n" not in str(info.value)


def test_a_pattern_that_matches_nothing_shows_what_is_inside(tmp_path):
    make_zip(tmp_path / "x.zip", FILES)
    with pytest.raises(SourceError, match=r"no file matches members 'nope'; inside are p/b.txt"):
        list(read_members(source(tmp_path / "x.zip", "nope"), [tmp_path / "x.zip"]))


def test_plain_and_gzipped_files_need_no_pattern(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.txt").write_bytes(b"plain")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"packed"))
    files = [tmp_path / "b.txt.gz", tmp_path / "sub/a.txt"]
    found = list(read_members(source(tmp_path / "**/*", None), files))
    assert found == [("b.txt.gz", b"packed"), ("sub/a.txt", b"plain")]  # names are relative


def test_damaged_gzip_is_one_line(tmp_path):
    path = tmp_path / "b.txt.gz"
    for content in (gzip.compress(b"packed" * 100)[:-10], b"nothing of the kind"):
        path.write_bytes(content)
        with pytest.raises(SourceError, match=r"b.txt.gz: "):
            list(read_members(source(path, None), [path]))


def test_documents_of_a_text_archive(tmp_path):
    make_tar(tmp_path / "x.tgz", FILES)
    found = list(extract(source(tmp_path / "x.tgz"), [tmp_path / "x.tgz"]))
    assert found == [("p/a.txt", "first"), ("p/b.txt", "second")]


def test_files_of_a_dataset_are_called_as_in_the_dataset(tmp_path):
    names = ["en/0.txt", "de/0.txt", "0.txt"]
    dataset = HuggingfaceSource(
        kind="huggingface", repo="o/n", revision="f" * 40, files=dict.fromkeys(names),
        format="txt", members=None, encoding="utf-8", text_field=None,
    )  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = extract(dataset, [tmp_path / name for name in names])
    assert [tuple(each) for each in found] == [(name, name) for name in names]
