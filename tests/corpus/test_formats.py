import io
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from tinyllm.corpus.documents import Document, read_documents, write_documents
from tinyllm.corpus.formats import read_format
from tinyllm.corpus.sources import FileSource
from tinyllm.errors import DataError


def read(content, text_format, text_field=None, encoding="utf-8"):
    reading = FileSource(
        kind="file", path="x", sha256=None, members=None,
        format=text_format, encoding=encoding, text_field=text_field,
    )  # fmt: skip
    if isinstance(content, str):
        content = content.encode(encoding)
    return [tuple(each) for each in read_format(reading, "x", io.BytesIO(content))]


def parquet(rows):
    file = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


ROWS = [{"text": "one", "n": 1}, {"text": "zwei ü", "n": 2}]
NUMBERED = [("x#0000000", "one"), ("x#0000001", "zwei ü")]


def test_text_loses_byte_order_mark_and_carriage_returns():
    assert read(b"\xef\xbb\xbfa\r\nb\rc", "txt") == [("x", "a\nb\nc")]
    assert read("naïve", "txt", encoding="latin-1") == [("x", "naïve")]


@pytest.mark.parametrize(
    ("text_format", "content"),
    [
        ("jsonl", "\n".join(map(json.dumps, ROWS))),
        ("json", json.dumps(ROWS)),
        ("yaml", "- {text: one, n: 1}\n- {text: zwei ü, n: 2}\n"),
        ("parquet", parquet(ROWS)),
    ],
)
def test_rows_become_documents(text_format, content):
    assert read(content, text_format, "text") == NUMBERED


def test_nested_fields_and_plain_rows():
    assert read('{"a": [{"b": "deep"}]}', "json", "a.0.b") == [("x#0000000", "deep")]
    assert read('["one", "two"]', "json") == [("x#0000000", "one"), ("x#0000001", "two")]


def test_many_parquet_rows_keep_their_numbers_and_skip_nulls():
    rows = [{"text": None if i == 5 else str(i)} for i in range(2500)]
    found = read(parquet(rows), "parquet", "text")
    assert len(found) == 2499
    assert found[-1] == ("x#0002499", "2499")


@pytest.mark.parametrize(
    ("content", "text_format", "field", "told"),
    [
        (b"caf\xe9", "txt", None, "x: byte 3 is not utf-8; correct the source's encoding"),
        ('{"text": "a"}\n{"text"', "jsonl", "text", "x:2: not readable as JSON"),
        ('{"body": "a"}', "jsonl", "text", "x:1: no field 'text'; it has body; correct text_field"),
        ('{"text": 5}', "jsonl", "text", "x:1: text is no text but int"),
        ('{"text": "a"}', "jsonl", None, "x:1: the row is no text but dict; set text_field"),
        ("a: [", "yaml", "a", "x: not readable as YAML"),
        (b"junk", "parquet", "text", "x: not readable as parquet"),
        (b"", "parquet", "text", "x: not readable as parquet"),
        (parquet(ROWS), "parquet", "body", "no column 'body'; it has text, n"),
        (parquet(ROWS)[:-20], "parquet", "text", "x: not readable as parquet"),
        (parquet(ROWS), "parquet", "n", "the row is no text but int"),
        ('{"input": 1}', "parables", None, "does not have the form that format parables reads"),
        ('{"k": {}}', "chitchat", None, "does not have the form that format chitchat reads"),
    ],
)
def test_wrong_content_is_one_line(content, text_format, field, told):
    with pytest.raises(DataError) as info:
        read(content, text_format, field)
    assert told in str(info.value)
    assert "\n" not in str(info.value)


def test_tagged_words_become_prose():
    tagged = (
        "The/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' ;/. ;/.\n"
        "It/pps cost/vbd $5/nns and/or/cc more/ap (/( much/ap )/) ?/. ?/.\n"
    )
    prose = 'The jury said "no evidence";\nIt cost $5 and/or more (much)?'
    assert read(tagged, "tagged_words") == [("x", prose)]


def test_parables_end_with_the_right_moral():
    content = "A fox saw grapes.\n\nWhich moral is it? A) Be kind. B) Sour grapes. C) Run."
    row = {"input": [{}, {"content": content + "\nThe output is a letter"}], "ideal": ["The B"]}
    expected = "A fox saw grapes.\n\nMoral: Sour grapes."
    assert read(json.dumps(row), "parables") == [("x#0000000", expected)]


def test_chitchat_joins_the_messages_of_one_sender():
    burst = [{"text": " hi "}, {"text": "you?"}]
    dialogues = {"b": {"messages": [[{"text": "late"}]]}, "a": {"messages": [burst, burst[:1]]}}
    expected = [("x#0000000", "- hi you?\n- hi"), ("x#0000001", "- late")]
    assert read(json.dumps(dialogues), "chitchat") == expected


def test_documents_survive_the_disk_in_shards(tmp_path):
    odd = 'line\nbreak \u2028 \x85 " \\ \0 \U0001f600'
    documents = [Document(f"d{i}", odd + str(i)) for i in range(50)]
    assert write_documents(tmp_path, documents, shard_bytes=500) == 50
    assert len(list(tmp_path.iterdir())) > 3
    assert list(read_documents(tmp_path)) == documents


def test_lone_surrogates_do_not_break_the_disk(tmp_path):
    write_documents(tmp_path, [Document("a", json.loads(r'"x\ud800y"'))])
    assert list(read_documents(tmp_path)) == [Document("a", "x\ufffdy")]


def test_damaged_documents_name_the_line(tmp_path):
    with pytest.raises(DataError, match=r"no documents-\*.jsonl here"):
        list(read_documents(tmp_path))
    (tmp_path / "documents-00000.jsonl").write_text('{"name": "a", "text": "b"}\n{"name": "a"}\n')
    with pytest.raises(DataError, match=r"documents-00000.jsonl:2: not a document"):
        list(read_documents(tmp_path))
