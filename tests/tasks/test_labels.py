"""What a label means."""

import pytest

from bayeslora.errors import InputError
from bayeslora.tasks.labels import label_index, sorted_classes, spell

WORDS = ("sand", "water", "salt")


def index(value, choices=WORDS, codes=(), classes=False):
    return label_index(value, choices, codes, classes=classes, where="t.csv line 4")


@pytest.mark.parametrize("value", [1, 1.0, "1", "B", "water", " water "])
@pytest.mark.parametrize("classes", [False, True])
def test_index_letter_and_text_name_the_same_choice(value, classes):
    assert index(value, classes=classes) == 1


@pytest.mark.parametrize("value", ["2", 2, 2.0])
def test_codes_come_before_the_index(value):
    assert index(value, codes=("1", "2", "3")) == 1


def test_an_integer_is_an_index_even_where_choices_are_numbers():
    assert index(1, ("3", "2", "1")) == 1


def test_a_class_name_comes_before_the_index():
    assert index(1, ("1", "2"), classes=True) == 0


def test_a_truth_value_is_the_index_of_no_and_yes():
    assert [index(value, ("no", "yes"), classes=True) for value in (False, True)] == [0, 1]


@pytest.mark.parametrize("value", [None, "", "  ", float("nan")])
def test_a_blank_is_no_label(value):
    assert index(value) is None


@pytest.mark.parametrize("value", [3, -1, "3", "D", "pepper", 0.5, "b"])
def test_a_label_that_names_nothing_is_refused_with_its_place(value):
    with pytest.raises(InputError, match=r"t\.csv line 4: the label '.*' is out of range"):
        index(value)


def test_a_number_that_is_no_class_is_not_taken_for_an_index():
    with pytest.raises(InputError, match="one of 1, 2, 4, 5"):
        index(3, ("1", "2", "4", "5"), classes=True)


@pytest.mark.parametrize(("value", "choices"), [("A", ("B", "A")), ("1", ("1", "2"))])
def test_text_with_two_meanings_is_refused(value, choices):
    with pytest.raises(InputError, match="codes"):
        index(value, choices)


def test_text_whose_readings_agree_is_accepted():
    assert index("1", ("0", "1")) == 1


def test_classes_are_sorted_as_numbers_only_if_all_are():
    assert sorted_classes([10, "9", 10.0, None, " 9"]) == ("9", "10")
    assert sorted_classes(["b", "10", "9"]) == ("10", "9", "b")
    assert sorted_classes([f"{zeros}1" for zeros in ("000", "", "0", "00")]) == ("0001", "001", "01", "1")


def test_a_whole_float_is_spelled_as_an_integer():
    assert [spell(value) for value in (3.0, 2.5, 3, "3 ")] == ["3", "2.5", "3", "3"]
