"""Data and configuration files as strangers have them: refused with their place, or read as they mean it."""

import codecs
import gzip
import io
import math
import os
import runpy
import sys
from pathlib import Path

import datasets
import pytest

from bayeslora.cli import main
from bayeslora.cli.parse import parse
from bayeslora.cli.train import Options
from bayeslora.cli.values import load_yaml
from bayeslora.errors import InputError
from bayeslora.tasks import Columns, Format, load_task, read_rows, split_from_rows
from bayeslora.tasks.files import read_text

TEXT = "text,label\ncafé,a\nthé,b\n"


def refused(path, content, said):
    """Write a file, and check that it is refused with its name and these words, in one line."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    with pytest.raises(InputError) as caught:
        load_task(data=path, validation=0)
    sentence = str(caught.value)
    assert said in sentence
    assert path.name in sentence
    assert "\n" not in sentence
    assert len(sentence) < 600


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (TEXT.encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        ("text,label\na,b\n".encode("utf-16-le"), "line 1 holds a NUL"),
        (TEXT.encode("latin-1"), "line 2 is not UTF-8 text (byte 14)"),
        (gzip.compress(TEXT.encode(), mtime=0), "is compressed by gzip: unpack it first"),
        (b"PK\x03\x04" + bytes(20), "a zip archive or a spreadsheet"),
        ("text,label\na\0b,c\n", "line 2 holds a NUL"),
        ("", "has no rows"),
        ("\n\n  \n", "has no rows"),
        ("text,label\n", "has no rows"),
        (
            'text,label\na,b\n"c,d\ne,f\n',
            "line 3: the row is malformed (unexpected end of data); is a quote",
        ),
        (f"text,label\na,b\n{'x' * 200_000},c\n", "line 3: the row is malformed (field larger than field limit"),
        ("text,label\na,b\nc,d,e\n", "line 3 has 3 cells where the header has 2"),
        ("text,label\na,b\nc\n", "line 3 has 1 cells where the header has 2"),
        ("text,label,text\na,b,c\n", "line 1 names a column twice: 'text'"),
        ("text;label\na;b\nc;d\n", "separate columns by commas, not by ';'"),
        ("text\tlabel\na\tb\nc\td\n", r"separate columns by commas, not by '\t'"),
        ("text,label\na,nan\nb,x\n", "line 2: the label 'nan' is no whole number"),
        ("text,label\na,x\nb,0.731\n", "line 3: the label '0.731' is no whole number"),
        ("text,label\na,x\n ,y\n", "line 3: the column 'text' is ' '"),
        ("text,label\n" + "".join(f"t{i},id{i}\n" for i in range(1001)), "1,001 different values in its label column"),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused_with_its_place(tmp_path, content, said):
    refused(tmp_path / "rows.csv", content, said)


GOOD = '{"text": "t", "label": "a"}\n{"text": "u", "label": "b"}\n'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "x", "label": ["a"]}', "line 3: the label ['a'] is no text or number"),
        ('{"text": "x", "label": {"a": 1}}', "line 3: the label {'a': 1} is no text or number"),
        ('{"text": "x", "label": NaN}', "line 3 cannot be used: it holds NaN"),
        ('{"text": "x", "label": 0.5}', "line 3: the label '0.5' is no whole number"),
        ('{"text": "x", "label": "a", "label": "b"}', "line 3 cannot be used: the key 'label' is given twice"),
        ('{"text": "\\ud800", "label": "a"}', "line 3 cannot be used: it holds a half of a surrogate pair"),
        ('{"text": "x", "label": "a", "id": "\\udfff"}', "line 3 cannot be used: it holds a half of a surrogate pair"),
        ('{"text": "x", "label": ' + "9" * 5000 + "}", "line 3 cannot be used: it holds"),
        ('{"text": ' + "[" * 100_000, "line 3 cannot be used: it is nested too deeply"),
        ('{"text": "x", "la', "line 3 is not valid JSON: Unterminated string starting at at column 15"),
        ('{"text": ["x"], "label": "a"}', "line 3: the column 'text' is ['x']: it should hold text"),
        ("[1, 2]", "line 3 holds '[1, 2]'"),
    ],
)
def test_json_that_cannot_be_used_is_refused_with_its_place(tmp_path, line, said):
    refused(tmp_path / "rows.jsonl", GOOD + line, said)
    refused(tmp_path / "rows.jsonl", (GOOD + line).replace("\n", "\r"), said)
    if line.endswith("}"):
        rows = f"[{GOOD.strip()}\n{line}]".replace("}\n", "},\n")
        refused(tmp_path / "rows.json", rows, said.replace("line 3", "row 3"))


def test_what_is_no_file_of_data_is_refused_and_nothing_hangs(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "train.csv")
    with pytest.raises(InputError, match=r"train\.csv is not a regular file"):
        load_task(data=tmp_path)
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    for path in (tmp_path / "train.csv", tmp_path / "zero.csv", "/dev/zero"):
        with pytest.raises(InputError, match=r"is not a regular file|ends in none of"):
            load_task(data=path)
    (tmp_path / "large.csv").touch()
    os.truncate(tmp_path / "large.csv", 2**33)
    with pytest.raises(InputError, match=r"large\.csv has 8,589,934,592 bytes, and at most"):
        read_rows(tmp_path / "large.csv")
    for odd in ("~nobody-is-called-so/rows.csv", "x" * 300 + ".csv", "a\0b.csv"):
        with pytest.raises(InputError, match="There is no file"):
            load_task(data=odd)
    monkeypatch.setattr("bayeslora.tasks.files.MAX_BYTES", 5)
    with pytest.raises(InputError, match="standard input has more than 5 bytes"):
        read_text(io.StringIO("123456"), "standard input")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_byte_order_marks_and_ends_of_lines_do_not_matter(tmp_path, end, mark):
    for name, content in (("rows.csv", TEXT), ("rows.jsonl", GOOD)):
        (tmp_path / name).write_bytes(mark + content.replace("\n", end).encode())
        task = load_task(data=tmp_path / name)
        assert task.test.classes == ("a", "b")
        assert task.test.labels.tolist() == [0, 1]


def test_a_stream_is_utf8_whatever_the_locale():
    stream = io.TextIOWrapper(io.BytesIO(TEXT.encode()), encoding="ascii", errors="surrogateescape")
    assert read_rows(stream).values[0]["text"] == "café"


def test_whole_numbers_are_the_same_class_with_and_without_a_fraction_of_zero(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,0.0\nb,1.0\nc,1\n")  # as pandas writes a column with blanks
    test = load_task(data=tmp_path / "rows.csv").test
    assert (test.classes, test.labels.tolist()) == (("0", "1"), [0, 1, 1])
    named = split_from_rows([{"text": "x", "label": "1.0"}], columns=Columns(classes=("0.0", "1.0")))
    assert named.labels.tolist() == [1]
    named = split_from_rows([{"text": "x", "label": "nan"}], columns=Columns(classes=("nan", "0.5")))
    assert named.labels.tolist() == [0]


def test_numbers_of_a_parquet_file_that_are_none_are_missing(tmp_path):
    rows = [{"text": "a", "label": 1.0, "size": math.nan}, {"text": "b", "label": 0.0, "size": math.inf}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "[r].parquet"))
    assert [row["size"] for row in read_rows(tmp_path / "[r].parquet")] == [None, None]
    assert load_task(data=tmp_path / "[r].parquet").test.classes == ("0", "1")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"choices": [["a"], "b"], "label": 0}, r"rows row 1: the choice \['a'\] should be text"),
        ({"choices": [{"a": 1}, "b"], "label": 0}, "rows row 1: the choice {'a': 1} should be text"),
        ({"choices": ["a", "a\ud800"], "label": 0}, "rows row 1: the choice .* should be text"),
        ({"choices": [math.nan, "b"], "label": 0}, "rows row 1 has an empty choice"),
        (
            {"choices": "[" * 9999, "label": 0},
            "the column 'choices' is not a JSON list of choices: it is nested",
        ),
        ({"choices": '["a", "b", "a"]', "label": 0}, "row 1 has the choice 'a' twice"),
        ({"choices": {"text": ["a", "b"], "label": ["x", "x"]}, "label": "x"}, "the label 'x' is that of two choices"),
        ({"choices": ["a", "b"], "label": b"a"}, "the label b'a' is no text or number"),
        ({"choices": ["a", "b"], "label": "1" * 5000}, "is out of range"),
        ({"choices": ["a", "b"], "label": "c"}, "the label 'c' is out of range"),
        ({"choices": ["a", "b"], "label": 0, "text": "\ud800"}, "it should hold text"),
    ],
)
def test_a_row_of_a_program_is_looked_at_as_one_of_a_file(row, said):
    with pytest.raises(InputError, match=said):
        split_from_rows([{"text": "t"} | row])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{text!r:>1000000000}", "a conversion or a format specification"),
        ("{text:{extra}}", "a conversion or a format specification"),
        ("{}", "a placeholder {} without a name"),
        ("{text", "is malformed"),
        ("{text}\ud800", "surrogate"),
        ("{text}" * 101, "has 101 placeholders"),
        ("{text.__class__}", "no column 'text.__class__', which the template names"),
        ("{0}", "no column '0'"),
        ("{text[0]}", "no column 'text[0]'"),
    ],
)
def test_a_template_reads_columns_and_nothing_else(template, said):
    with pytest.raises(InputError) as caught:
        split_from_rows([{"text": "t", "extra": "9", "label": "a"}], Format(template), classes=("a", "b"))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: &a [x, x]\ntask: *a\n", "line 2 has an alias; write the value itself"),
        ("task: !!python/object/apply:os.system [ls]\n", "line 1 has the tag tag:yaml.org,2002:python/object/apply"),
        ("seed: !!int abc\n", "has the tag"),
        ("? [a]\n: b\n", "line 1 has a key that is no word"),
        ("task: a\ntask: b\n", "line 2 gives 'task' a second time"),
        ("trainer: {a: 1, a: 2}\n", "line 1 gives 'a' a second time"),
        ("trainer: {a: 2024-13-45}\n", "cannot be read: month must be in"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("task: caf\xe9\n".encode("latin-1"), "cannot be read: 'utf-8' codec"),
        ('task: "a\\0b"\n', "task must be text, and it is 'a\\x00b'"),
        ('task: "\\ud800"\n', "task must be text"),
        ("seed: " + "9" * 5000, "seed must be a whole number, and it is '999"),
        ("draws: .inf", "draws must be a whole number"),
        ("learning_rate: nan", "learning_rate must be a number"),
        ("tusk: x", "unknown option 'tusk'"),
        ("- a\n", "must hold options and their values"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(tmp_path, content, said):
    (tmp_path / "run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        parse(Options, ["--config", str(tmp_path / "run.yaml")], verb="train", examples="")
    assert said in str(caught.value)
    assert "run.yaml" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_configuration_that_never_ends_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", Path("/dev/zero")):
        with pytest.raises(InputError, match="is not a regular file"):
            load_yaml(path)


def test_words_are_as_they_are_typed_and_the_trainers_values_as_yaml_has_them(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "classes: [yes, no, 010, 2024-01-02, 1e3, '~', null]\ntrainer: {bf16: no, max_grad_norm: 0.5, optim: sgd}\n"
    )
    assert load_yaml(tmp_path / "run.yaml") == {
        "classes": ["yes", "no", "010", "2024-01-02", "1e3", "~", None],
        "trainer": {"bf16": "no", "max_grad_norm": "0.5", "optim": "sgd"},
    }
    typed = load_yaml(tmp_path / "run.yaml", typed="trainer")
    assert typed["trainer"] == {"bf16": False, "max_grad_norm": 0.5, "optim": "sgd"}
    assert typed["classes"][:2] == ["yes", "no"]


def test_an_output_that_cannot_be_encoded_is_said_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["demo", "--help"]) in (0, 2)
    monkeypatch.setattr("bayeslora.cli.export.run", lambda options: print("é"))
    assert main(["export", "run", "--out", "x"]) == 2
    assert "characters that ascii lacks; set PYTHONIOENCODING=utf-8" in capsys.readouterr().err


@pytest.mark.parametrize("inputs", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_files_are_refused_or_used(inputs):
    script = Path(__file__).parents[2] / "benchmarks" / "soak" / "data_files.py"
    count, faults, *_ = runpy.run_path(str(script))["run"](2, range(inputs))
    assert faults == []
    assert sum(number for key, number in count.items() if key[2] == "used") > inputs / 5
    assert {key[0] for key in count} == {"csv", "tsv", "jsonl", "json", "yaml"}
