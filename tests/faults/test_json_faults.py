"""JSON from strangers: what has no or two readings is refused in words, and nothing is read that never ends."""

import json
import os

import pytest

from bayeslora.errors import InputError
from bayeslora.files import parse_json, read_bytes, read_object


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' is given twice"),
        ('[1, {"a": NaN}]', "NaN, Infinity"),
        ('{"a": [-Infinity]}', "NaN, Infinity"),
        ("[1e999]", "too large"),
        ("1" * 5000, "too large"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 40 + "]" * 40, "nested too deeply"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        ("{", "Expecting"),
        ("", "Expecting"),
    ],
)
def test_json_without_one_reading_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_any_other_json_is_what_json_says():
    text = '{"a": [1, -2.5e3, "\\ud83d\\ude00", null, true, {"a": 1}], "\u00e9": {}, "n": ' + "9" * 300 + "}"
    assert parse_json(text) == json.loads(text)


def test_a_pipe_a_device_and_a_large_file_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(InputError, match="is not a regular file"):
            read_bytes(path)
    (tmp_path / "large").write_bytes(b"12345")
    with pytest.raises(InputError, match="has 5 bytes, and at most 4 are read"):
        read_bytes(tmp_path / "large", 4)
    with pytest.raises(InputError, match="There is no file"):
        read_bytes(tmp_path / "none")
    assert read_bytes(tmp_path / "large", 5) == b"12345"


def test_an_object_with_a_repeated_key_or_of_half_a_character_is_refused(tmp_path):
    for text in ('{"a": 1, "a": 2}', '{"a": "\\ud800"}', "[" * 9999):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config.json cannot be read \(.*\); copy the folder again"):
            read_object(tmp_path / "config.json", "none")
