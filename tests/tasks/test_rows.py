"""Rows to examples."""

import io

import pytest

from bayeslora.errors import InputError
from bayeslora.tasks import Columns, Format, read_rows, split_from_rows
from bayeslora.tasks.columns import make_columns

MC = {"question": "q?", "choices": ["a", "b"], "label": 1}


def only(row, columns=None, **options):
    return split_from_rows([row], columns=columns, **options).examples[0]


def test_guessed_columns_give_multiple_choice_where_there_are_choices():
    split = split_from_rows([MC])
    assert (split.classes, split.format.kind) == (None, "question")
    assert (split.examples[0].text, split.examples[0].choices, split.labels.tolist()) == ("q?", ("a", "b"), [1])


def test_guessed_columns_give_classes_where_there_are_no_choices():
    split = split_from_rows([{"text": "x", "label": "no"}, {"text": "y", "label": "go"}])
    assert (split.classes, split.format.kind, split.labels.tolist()) == (("go", "no"), "class", [1, 0])


@pytest.mark.parametrize(
    "cell", [["a", "b"], ("a", " b "), '["a", "b"]', {"text": ["a", "b"], "label": ["1", "2"]}], ids=str
)
def test_choices_may_be_a_list_a_json_list_or_labelled(cell):
    assert only(MC | {"choices": cell}).choices == ("a", "b")


@pytest.mark.parametrize(("own", "key"), [(["A", "B", "C"], "C"), (["1", "2", "3"], "3"), (["1", "2", "3"], 3)])
def test_a_label_is_matched_against_the_labels_of_the_rows_own_choices(own, key):
    row = {"question": "q", "choices": {"text": ["2", "3", "4"], "label": own}, "label": key}
    assert only(row).label == 2


def test_trailing_blank_option_columns_are_choices_that_the_row_lacks():
    columns = Columns(text="q", choices=("x", "y", "z"), label="k", codes=("1", "2", "3"))
    row = {"q": "t", "x": "a", "y": "b", "z": "", "k": "2"}
    assert (only(row, columns).choices, only(row, columns).label) == (("a", "b"), 1)
    with pytest.raises(InputError, match="out of range"):
        only(row | {"k": "3"}, columns)
    with pytest.raises(InputError, match="empty choice"):
        only(row | {"y": "", "z": "c"}, columns)


def test_a_passage_comes_before_the_text():
    row = {"text": "q", "passage": "p", "label": "b"}
    assert only(row, Columns(context="passage", classes=("a", "b"))).text == "p\nq"


def test_rows_without_a_label_column_have_no_label():
    rows = read_rows(io.StringIO('{"text": "x"}\n{"text": "y"}\n'))
    split = split_from_rows(rows, Format("{text}", "head", kind="class"), classes=("a", "b"))
    assert split.labels.tolist() == [-1, -1]
    assert (split.classes, split.format.template, split.examples[0].choices) == (("a", "b"), "{text}", ("a", "b"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q?", "choices": ["a"], "label": 0}, "fewer than 2 choices"),
        ({"question": "q?", "choices": ["a", " "], "label": 0}, "empty choice"),
        ({"question": "q?", "choices": ["a", "a"], "label": 0}, "the choice 'a' twice"),
        ({"question": "q?", "choices": "a", "label": 0}, "a list of choices"),
        ({"question": "q?", "choices": "[a", "label": 0}, "not a JSON list"),
        ({"question": " ", "choices": ["a", "b"], "label": 0}, "should hold text"),
        ({"question": None, "choices": ["a", "b"], "label": 0}, "should hold text"),
        ({"question": "q?", "choices": ["a", "b"], "label": 2}, "out of range"),
        ({"question": "q?", "choices": ["a", "b"], "label": None}, "is blank"),
        ({"choices": ["a", "b"], "label": 0}, "no column 'question': its columns are choices, label"),
        ({"question": "q?", "label": 0}, "no column 'choices'"),
        ({"question": "q?", "choices": ["a", "b"]}, "no column 'label'"),
    ],
)
def test_a_bad_row_is_refused_with_its_place(row, said):
    with pytest.raises(InputError) as caught:
        split_from_rows([MC, row], name="mine")
    assert str(caught.value).startswith("mine row 2")
    assert said in str(caught.value)


def test_the_first_blank_label_is_named_where_later_rows_have_one():
    with pytest.raises(InputError, match="rows row 1: the label in column 'label' is blank"):
        split_from_rows([MC | {"label": ""}, MC])


def test_a_repeated_choice_is_kept_where_it_is_allowed():
    assert only(MC | {"choices": ["a", "a", "b"], "label": 2}, allow_duplicates=True).choices == ("a", "a", "b")


def test_no_rows_are_refused():
    with pytest.raises(InputError, match="has no rows"):
        split_from_rows([])


@pytest.mark.parametrize(
    ("row", "said"),
    [({"text": "x"}, "no label column 'label'"), ({"text": "x", "label": "a"}, "one value 'a'")],
)
def test_classes_that_cannot_be_found_are_asked_for(row, said):
    with pytest.raises(InputError, match=said):
        split_from_rows([row])


def test_needed_labels_that_are_missing_are_refused():
    with pytest.raises(InputError, match="no column 'label'"):
        split_from_rows([{"text": "x"}], classes=("a", "b"), need_labels=True)
    with pytest.raises(InputError, match="is blank"):
        split_from_rows([{"text": "x", "label": ""}], classes=("a", "b"), need_labels=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"txt": "a"}, "unknown key 'txt'"),
        ({"text": None}, "give a column name"),
        ({"text": ["a"]}, "give a column name"),
        ({"classes": "ab"}, "give a list of names"),
        ({"choices": 3}, "a column name or a list"),
        ({"choices": ["a"]}, "at least two"),
        ({"classes": ["a", "a"]}, "given twice"),
        ({"choices": ["a", "b"], "classes": ["a", "b"]}, "both choices and classes"),
        ({"classes": ["a", "b"], "codes": ["1"]}, "1 codes for 2 classes"),
    ],
)
def test_columns_that_make_no_sense_are_refused(given, said):
    with pytest.raises(InputError) as caught:
        make_columns(given, Columns())
    assert said in str(caught.value)


def test_a_mapping_changes_only_the_fields_it_names():
    base = Columns(text="t", label="l", classes=("a", "b"))
    assert make_columns({"label": "y"}, base) == Columns(text="t", label="y", classes=("a", "b"))
    assert make_columns({"choices": ["x", "y"]}, base) == Columns(text="t", label="l", choices=("x", "y"))
