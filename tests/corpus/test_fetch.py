import hashlib
import os
import socket
import sys
from pathlib import Path

import pytest
from servers import serve

from tinyllm.corpus import fetch_registry
from tinyllm.corpus.fetch import fetch
from tinyllm.corpus.fetch_https import ATTEMPTS, fetch_https
from tinyllm.corpus.sources import FileSource, HttpsSource, HuggingfaceSource, NpmSource, PypiSource
from tinyllm.errors import SourceError
from tinyllm.progress import Silent

READING = {"format": "txt", "members": None, "encoding": "utf-8", "text_field": None}
CONTENT = os.urandom(700_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def site():
    with serve() as site:
        site.files["/a/text.bin"] = CONTENT
        yield site


def https(site, sha256=SHA256):
    return HttpsSource(kind="https", url=f"{site.url}/a/text.bin", sha256=sha256, **READING)


def get(source, directory):
    waits = []
    path = fetch_https(source, directory, Silent(), sleep=waits.append)
    assert path.read_bytes() == CONTENT
    return waits


def test_https_fetches_and_does_not_ask_twice(site, tmp_path):
    assert get(https(site), tmp_path) == []
    get(https(site), tmp_path)
    assert len(site.asked) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.bin"]


def test_https_continues_where_the_connection_was_cut(site, tmp_path):
    site.cuts = [300_000, 200_000]
    get(https(site), tmp_path)
    assert [wanted for _, _, wanted in site.asked] == [None, "bytes=300000-", "bytes=500000-"]


def test_https_starts_over_if_the_server_knows_no_ranges(site, tmp_path):
    site.cuts, site.ranges = [300_000], False
    get(https(site), tmp_path)


def test_https_continues_the_part_of_an_earlier_run(site, tmp_path):
    (tmp_path / "text.bin.part").write_bytes(CONTENT[:100_000])
    get(https(site), tmp_path)
    assert site.asked[0][2] == "bytes=100000-"


def test_https_replaces_a_part_of_another_file(site, tmp_path):
    (tmp_path / "text.bin.part").write_bytes(b"x" * 1000)
    get(https(site), tmp_path)
    (tmp_path / "text.bin").unlink()
    (tmp_path / "text.bin.part").write_bytes(b"x" * 900_000)  # longer: the server says 416
    get(https(site), tmp_path)


def test_https_waits_longer_after_each_server_error(site, tmp_path):
    site.statuses = [500, 503, 500]
    assert get(https(site), tmp_path) == [1.0, 2.0, 4.0]


def test_https_gives_up_after_some_tries(site, tmp_path):
    site.statuses = [500] * 20
    waits = []
    with pytest.raises(SourceError, match=r"HTTP 500 .*tried 6 times, check the network"):
        fetch_https(https(site), tmp_path, Silent(), sleep=waits.append)
    assert len(site.asked) == ATTEMPTS


def test_https_does_not_retry_what_is_not_there(site, tmp_path):
    del site.files["/a/text.bin"]
    with pytest.raises(SourceError, match="HTTP 404 .*check the address"):
        get(https(site), tmp_path)
    assert len(site.asked) == 1


def test_https_refuses_another_file_and_keeps_the_good_one(site, tmp_path):
    (tmp_path / "text.bin").write_bytes(b"older and good")
    with pytest.raises(SourceError, match=f"SHA-256 is {SHA256}, promised was {'0' * 64}"):
        get(https(site, "0" * 64), tmp_path)
    assert (tmp_path / "text.bin").read_bytes() == b"older and good"
    assert not (tmp_path / "text.bin.part").exists()


def test_https_without_a_network_is_one_line(tmp_path):
    with socket.socket() as taken:  # bound but not listening: refuses connections
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/x.txt"
        source = HttpsSource(kind="https", url=url, sha256=SHA256, **READING)
        with pytest.raises(SourceError, match="refused; tried 6 times, check the network") as info:
            fetch_https(source, tmp_path, Silent(), sleep=lambda _: None)
    assert "\n" not in str(info.value)


def test_a_full_disk_is_not_taken_for_a_broken_network(site, tmp_path, monkeypatch):
    real = Path.open

    def no_space(path, mode="r", *args, **kwargs):
        if path.name.endswith(".part"):
            raise OSError(28, "No space left on device", str(path))
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", no_space)
    with pytest.raises(OSError, match="No space left") as info:
        get(https(site), tmp_path)
    assert info.value.errno == 28
    assert len(site.asked) == 1


@pytest.fixture
def hub(monkeypatch):
    with serve() as site:
        site.files[f"/datasets/o/stories/resolve/{'f' * 40}/data/a.txt"] = CONTENT
        monkeypatch.setenv("HF_ENDPOINT", site.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield site


def dataset(files):
    fixed = {"kind": "huggingface", "repo": "o/stories", "revision": "f" * 40}
    return HuggingfaceSource(**fixed, files=files, **READING)


def test_huggingface_fetches_a_file_of_a_dataset(hub, tmp_path):
    [path] = fetch(dataset({"data/a.txt": SHA256}), tmp_path, Silent())
    assert path == tmp_path / "data/a.txt"
    assert path.read_bytes() == CONTENT


def test_huggingface_continues_after_a_cut(hub, tmp_path):
    hub.cuts = [300_000]
    [path] = fetch(dataset({"data/a.txt": SHA256}), tmp_path, Silent())
    assert path.read_bytes() == CONTENT
    assert [method for method, _, _ in hub.asked].count("GET") == 2


def test_huggingface_checks_the_hash(hub, tmp_path):
    with pytest.raises(SourceError, match=r"a.txt: SHA-256 is .*, promised was 1111"):
        fetch(dataset({"data/a.txt": "1" * 64}), tmp_path, Silent())
    assert not (tmp_path / "data/a.txt").exists()


def test_huggingface_names_a_file_that_is_not_there(hub, tmp_path):
    with pytest.raises(SourceError, match=r"o/stories: has no file data/b.txt"):
        fetch(dataset({"data/b.txt": None}), tmp_path, Silent())


def test_huggingface_without_a_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it retries 20 s
    with pytest.raises(SourceError, match="^o/stories: cannot reach the hub .*network") as info:
        fetch(dataset({"data/a.txt": None}), tmp_path, Silent())
    assert "\n" not in str(info.value)


def pypi(sha256=SHA256):
    return PypiSource(kind="pypi", spec="words==1.0", sha256=sha256, **READING)


def fake_client(tmp_path, monkeypatch, body):
    """Put a script in the place of both Python (for pip) and npm."""
    client = tmp_path / "bin" / "npm"
    client.parent.mkdir()
    client.write_text(f"#!{sys.executable}\nimport sys\nargs = sys.argv\n{body}\n")
    client.chmod(0o755)
    monkeypatch.setattr(fetch_registry.sys, "executable", str(client))
    monkeypatch.setenv("PATH", str(client.parent))


LEAVE_FILE = """
flag = "--dest" if "--dest" in args else "--pack-destination"
open(args[args.index(flag) + 1] + "/words-1.0.tgz", "wb").write(b"packed")
"""
PACKED = hashlib.sha256(b"packed").hexdigest()


@pytest.mark.parametrize(
    "source",
    [
        pypi(PACKED),
        NpmSource(kind="npm", spec="@a/words@1.0", sha256=PACKED, **READING),
    ],
)
def test_registry_files_are_checked_and_kept(tmp_path, monkeypatch, source):
    fake_client(tmp_path, monkeypatch, LEAVE_FILE)
    [path] = fetch(source, tmp_path / "files", Silent())
    assert path.read_bytes() == b"packed"
    monkeypatch.setenv("PATH", "/nowhere")
    assert fetch(source, tmp_path / "files", Silent()) == [path]  # no client is asked again
    assert [each.name for each in (tmp_path / "files").iterdir()] == ["words-1.0.tgz"]


def test_npm_file_with_another_hash_is_refused(tmp_path, monkeypatch):
    fake_client(tmp_path, monkeypatch, LEAVE_FILE)
    source = NpmSource(kind="npm", spec="words@1.0", sha256="0" * 64, **READING)
    with pytest.raises(SourceError, match=f"not the promised one, its SHA-256 is {PACKED}"):
        fetch(source, tmp_path / "files", Silent())
    assert list((tmp_path / "files").iterdir()) == []


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\\n  Got        " + "a" * 64, "a" * 64),
        ("WARNING: Retrying after connection broken by 'NewConnectionError'\\n"
         "ERROR: No matching distribution found for words==1.0", "cannot reach the registry"),
        ("ERROR: No matching distribution found for words==1.0", "no such version"),
        ("OSError: [Errno 28] No space left on device", "no space left on the disk"),
        ("hm", "download failed: hm"),
    ],
)  # fmt: skip
def test_a_failing_client_becomes_one_line(tmp_path, monkeypatch, printed, told):
    fake_client(tmp_path, monkeypatch, f"print('''{printed}''', file=sys.stderr); sys.exit(1)")
    with pytest.raises(SourceError, match=f"^words==1.0: .*{told}") as info:
        fetch(pypi(), tmp_path / "files", Silent())
    assert "\n" not in str(info.value)


def test_without_npm_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    source = NpmSource(kind="npm", spec="words@1.0", sha256=SHA256, **READING)
    with pytest.raises(SourceError, match=r"npm is not installed; install Node.js"):
        fetch(source, tmp_path, Silent())


def test_offline_refuses_the_network_but_not_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLLM_OFFLINE", "1")
    with pytest.raises(SourceError, match="words==1.0: not fetched, TINYLLM_OFFLINE is set"):
        fetch(pypi(), tmp_path, Silent())
    (tmp_path / "a.txt").write_text("a")
    source = FileSource(kind="file", path=str(tmp_path / "*.txt"), sha256=None, **READING)
    assert fetch(source, tmp_path, Silent()) == [tmp_path / "a.txt"]


def files(path, sha256=None):
    return FileSource(kind="file", path=str(path), sha256=sha256, **READING)


def test_files_by_glob_are_sorted(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = fetch(files(tmp_path / "**/*.txt"), tmp_path, Silent())
    assert found == [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "sub/c.txt"]


def test_file_mistakes_are_told(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    for source, told in [
        (files(tmp_path / "c.txt"), "no such file"),
        (files(tmp_path), "is a folder; name its files"),
        (files(tmp_path / "a.txt", "0" * 64), "promised was 0000"),
        (files(tmp_path / "*.txt", "0" * 64), "one sha256 for 2 files"),
    ]:
        with pytest.raises(SourceError, match=told):
            fetch(source, tmp_path, Silent())
