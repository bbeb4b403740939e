"""Short reviews: their odds, their labels, and that no review stands twice."""

import math

import pytest
import torch

from bayeslora.comparison.verdict import guess
from bayeslora.errors import InputError
from bayeslora.tasks.reviews import BAD, CLASSES, GOOD, review_ood, review_task


def good_words(text):
    return sum(word.strip(".,:") in GOOD for word in text.split())


def test_the_odds_are_those_of_the_good_things_that_are_said():
    assert not set(GOOD) & set(BAD)
    for split in (review_task(40, 20, 60).train, review_task(40, 20, 60).test):
        for example in split:
            yes = (good_words(example.text) + 1 / 3) / (3 + 2 / 3)
            assert example.probs == pytest.approx((1 - yes, yes))
            assert example.choices == CLASSES == split.classes


@pytest.mark.parametrize("seed", range(5))
def test_labels_have_the_true_shares_up_to_one_row_and_all_numbers_of_good_things_are_equally_frequent(seed):
    rows = review_task(10, 10, 402, seed).test
    for good in range(4):
        labels = [e.label for e in rows if good_words(e.text) == good]
        assert len(labels) in (100, 101)
        assert abs(sum(labels) - (good + 1 / 3) / (3 + 2 / 3) * len(labels)) < 1


def test_no_review_stands_twice_and_a_seed_gives_the_same_rows():
    task = review_task(300, 100, 600, seed=3)
    texts = [e.text for split in (task.train, task.validation, task.test) for e in split]
    assert len(set(texts)) == 1000
    again = review_task(300, 100, 600, seed=3)
    assert again == task
    assert review_task(300, 100, 600, seed=4).train.examples[0] != task.train.examples[0]
    assert [len(s) for s in (task.train, task.validation, task.test)] == [300, 100, 600]


def test_the_other_sentences_have_the_same_classes_and_no_labels():
    other = review_ood(50, seed=1)
    assert len(other) == 50
    assert other.classes == CLASSES
    assert all(e.label is None and e.probs is None for e in other)
    assert not any(good_words(e.text) for e in other)


def test_a_guess_is_a_fifth_of_a_nat_from_the_truth():
    truth = review_task(10, 10, 400).test.probs
    by_hand = (
        sum(p * math.log(2 * p) for k in range(4) for p in ((k + 1 / 3) / (11 / 3), 1 - (k + 1 / 3) / (11 / 3))) / 4
    )
    assert guess(truth) == pytest.approx(by_hand, abs=1e-6)
    assert by_hand == pytest.approx(0.213, abs=0.001)
    assert guess(torch.tensor([[1.0, 0.0, 0.0]])) == pytest.approx(0.0)


def test_numbers_of_rows_without_a_meaning_are_refused():
    with pytest.raises(InputError, match="0 rows"):
        review_task(0)
