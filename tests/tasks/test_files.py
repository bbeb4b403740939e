"""Rows from files and streams."""

import io
import json

import datasets
import pytest

from bayeslora.errors import InputError
from bayeslora.tasks import read_rows
from bayeslora.tasks.files import find_file

ROWS = [{"text": 'a "b", c', "label": "x"}, {"text": "d\u2028é", "label": "y"}]
JSONL = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
CSV = 'text,label\n"a ""b"", c",x\nd\u2028é,y\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.jsonl", JSONL),
        ("r.jsonl", "\ufeff" + JSONL.replace("\n", "\r\n") + "\n"),
        ("r.json", json.dumps(ROWS)),
        ("r.json", JSONL),
        ("r.csv", CSV),
        ("r.csv", "\ufeff" + CSV.replace("\n", "\r\n")),
        ("r.tsv", 'text\tlabel\n"a ""b"", c"\tx\nd\u2028é\ty\n'),
    ],
)
def test_every_text_format_gives_the_same_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert list(read_rows(tmp_path / name)) == ROWS


def test_parquet_gives_the_same_rows(tmp_path):
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "r.parquet"))
    assert list(read_rows(tmp_path / "r.parquet")) == ROWS


@pytest.mark.parametrize("content", [JSONL, json.dumps(ROWS), CSV])
def test_a_stream_is_recognised_by_its_first_character(content):
    assert list(read_rows(io.StringIO(content))) == ROWS


def test_lines_are_those_of_the_file():
    assert read_rows(io.StringIO('{"a": 1}\n\n{"a": 2}\n'), name="in").where(1) == "in line 3"
    assert read_rows(io.StringIO('a,b\n"1\n1",2\n\n3,4\n'), name="in").where(1) == "in line 5"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("r.jsonl", '{"a": 1}\n{"a": \n', "line 2 is not valid JSON"),
        ("r.jsonl", '{"a": 1}\n[1]\n', "line 2 holds"),
        ("r.json", '[{"a": 1},\n', "line 2 is not valid JSON"),
        ("r.json", "[1]", "row 1 is 1"),
        ("r.json", "a,b", "is not JSON"),
        ("r.csv", "a,b\n1,2\n1,2,3\n", "line 3 has 3 cells where the header has 2"),
        ("r.csv", 'a,b\n1,"2\n', "is malformed"),
        ("r.csv", "a,a\n1,2\n", "names a column twice"),
        ("r.txt", "a", "ends in none of"),
        ("r.parquet", "a", "is not a readable parquet file"),
    ],
)
def test_a_malformed_file_is_refused_with_the_place(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        read_rows(tmp_path / name)
    assert said in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "r.csv").write_bytes(b"text\ncaf\xe9\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read_rows(tmp_path / "r.csv")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="no file"):
        read_rows(tmp_path / "r.csv")


def test_parquet_from_a_stream_and_unknown_formats_are_refused():
    with pytest.raises(InputError, match="path of the file"):
        read_rows(io.StringIO(""), file_format="parquet")
    with pytest.raises(InputError, match="unknown"):
        read_rows(io.StringIO(""), file_format="xml")


def test_the_first_stem_that_is_there_is_found_and_two_endings_are_refused(tmp_path):
    assert find_file(tmp_path, ("valid", "dev")) is None
    (tmp_path / "dev.csv").touch()
    assert find_file(tmp_path, ("valid", "dev")) == tmp_path / "dev.csv"
    (tmp_path / "dev.json").touch()
    with pytest.raises(InputError, match=r"both dev\.json and dev\.csv"):
        find_file(tmp_path, ("valid", "dev"))
