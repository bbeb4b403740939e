"""Facts about the generated task: what is called the truth is the truth, and nothing leaks between its parts."""

import hashlib
import math
import os
import re
import subprocess
import sys

import pytest

from bayeslora.errors import InputError
from bayeslora.tasks.synthetic import DIE_TEMPLATES, URN_TEMPLATES, WHEEL_TEMPLATES, chance_ood, chance_task

TEMPLATES = (*URN_TEMPLATES, *DIE_TEMPLATES, *WHEEL_TEMPLATES)


def stated_count(sentence, outcome):
    """Read back how often the sentence says that an outcome occurs: ``3 red`` or ``red on 3``."""
    before = re.findall(rf"\b(\d+) {outcome}\b", sentence)
    after = re.findall(rf"\b{outcome} on (\d+)\b", sentence)
    (count,) = before + after
    return int(count)


def all_rows():
    task = chance_task()
    return [*task.train, *task.validation, *task.test]


def test_each_probability_is_the_stated_count_over_the_sum_of_the_counts():
    for example in all_rows():
        counts = [stated_count(example.text, choice) for choice in example.choices]
        assert example.probs == tuple(count / sum(counts) for count in counts)


def test_the_counts_in_a_sentence_are_those_of_its_choices_and_of_no_other_outcome():
    for example in all_rows():
        counts = [stated_count(example.text, choice) for choice in example.choices]
        total = [sum(counts)] if " sides of a die are " in example.text or " of its " in example.text else []
        assert sorted(map(int, re.findall(r"\d+", example.text))) == sorted(counts + total)


def test_probabilities_sum_to_one_and_every_label_names_a_choice():
    for example in all_rows():
        assert math.isclose(sum(example.probs), 1.0, abs_tol=1e-12)
        assert 0 <= example.label < len(example.choices) == len(set(example.choices))


def test_labels_fall_on_each_probability_as_often_as_it_says():
    # One choice per row keeps the bins independent: the sum over ten bins is chi-square with 10 degrees of freedom,
    # above 45.1 with probability 2e-6.
    rows = chance_task(train_rows=5000, validation_rows=1, test_rows=1, seed=3).train
    bins = [[0.0, 0.0] for _ in range(10)]
    for example in rows:
        p, hit = example.probs[0], example.label == 0
        slot = bins[min(int(10 * p), 9)]
        slot[0] += hit - p
        slot[1] += p * (1 - p)
    assert all(variance > 5 for _, variance in bins)
    assert sum(excess**2 / variance for excess, variance in bins) < 45.1


def test_the_probability_of_the_label_is_on_average_the_sum_of_squares():
    # E p(y) = sum p^2; |z| > 5 happens with probability 6e-7.
    rows = chance_task(train_rows=5000, validation_rows=1, test_rows=1, seed=4).train
    excess = sum(e.probs[e.label] - sum(p * p for p in e.probs) for e in rows)
    variance = sum(sum(p**3 for p in e.probs) - sum(p * p for p in e.probs) ** 2 for e in rows)
    assert abs(excess) < 5 * math.sqrt(variance)


def test_the_order_of_the_choices_says_nothing_about_the_odds():
    # In rows of two unequal choices the likelier one comes first in half; |z| > 5 has probability 6e-7.
    rows = chance_task(train_rows=5000, validation_rows=1, test_rows=1, seed=5).train
    firsts = [e.probs[0] > e.probs[1] for e in rows if len(e.probs) == 2 and e.probs[0] != e.probs[1]]
    assert abs(sum(firsts) - len(firsts) / 2) < 5 * math.sqrt(len(firsts)) / 2


def test_certainty_runs_from_even_to_nineteen_to_one():
    highest = [max(example.probs) for example in chance_task().test]
    assert max(highest) == 19 / 20
    assert {2, 3, 4} == {len(e.choices) for e in chance_task().test if max(e.probs) == min(e.probs)}
    assert sum(p > 0.8 for p in highest) > len(highest) / 10


def test_no_sentence_occurs_twice_in_the_task():
    sentences = [example.text for example in all_rows()]
    assert len(set(sentences)) == len(sentences) == 700


def test_every_template_occurs_and_no_sentence_has_a_hole():
    sentences = [example.text for example in all_rows()]
    for template in TEMPLATES:
        assert any(template_pattern(template).fullmatch(sentence) for sentence in sentences)
    assert not [sentence for sentence in sentences if "{" in sentence]


@pytest.mark.parametrize("make", [lambda seed: chance_task(seed=seed).train, lambda seed: chance_ood(seed=seed)])
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(make):
    assert make(1) == make(1)
    assert {e.text for e in make(1)} != {e.text for e in make(2)}


def test_rows_do_not_depend_on_the_hash_seed_of_python():
    def digest():
        return hashlib.sha256(repr((chance_task(seed=7), chance_ood(seed=7))).encode()).hexdigest()

    code = (
        "import hashlib; from bayeslora.tasks.synthetic import *\n"
        "print(hashlib.sha256(repr((chance_task(seed=7), chance_ood(seed=7))).encode()).hexdigest())"
    )
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "PYTHONHASHSEED": other, "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == digest()


def test_the_training_rows_do_not_change_with_the_number_of_test_rows():
    assert chance_task(test_rows=10).train == chance_task().train
    assert chance_task(test_rows=10).test == chance_task().test.take(range(10))


def test_sizes_and_names_are_those_asked_for():
    task = chance_task(train_rows=5, validation_rows=6, test_rows=7)
    assert [(s.name, len(s)) for s in (task.train, task.validation, task.test)] == [
        ("chance/train", 5),
        ("chance/validation", 6),
        ("chance/test", 7),
    ]
    assert len(chance_ood(8)) == 8


def template_pattern(template):
    return re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(template)))


def test_no_out_of_distribution_sentence_fits_a_template_of_the_task():
    patterns = [template_pattern(template) for template in TEMPLATES]
    for example in all_rows():
        assert any(pattern.fullmatch(example.text) for pattern in patterns)
    for example in chance_ood():
        assert not any(pattern.fullmatch(example.text) for pattern in patterns)


def test_out_of_distribution_rows_state_no_count_and_share_no_choice_with_the_task():
    ood = chance_ood()
    assert not [example.text for example in ood if re.search(r"\d", example.text)]
    assert not {c for e in ood for c in e.choices} & {c for e in all_rows() for c in e.choices}
    assert {len(e.choices) for e in ood} == {2, 3, 4}


def test_out_of_distribution_truth_is_uniform_where_it_exists():
    ood = chance_ood(4000)
    assert {e.probs is None for e in ood} == {True, False}
    for example in ood:
        assert (example.label is None) == (example.probs is None)
        assert example.probs is None or set(example.probs) == {1 / len(example.choices)}


def test_races_are_won_by_each_of_two_runners_equally_often():
    # Binomial with p = 1/2; |z| > 5 has probability 6e-7.
    labels = [e.label for e in chance_ood(4000) if e.label is not None and len(e.choices) == 2]
    assert len(labels) > 200
    assert abs(sum(labels) - len(labels) / 2) < 5 * math.sqrt(len(labels)) / 2


def splits():
    task = chance_task()
    return [task.train, task.validation, task.test, chance_ood()]


def test_prompts_are_short_and_answers_one_word():
    # A tokenizer that splits off digits and spaces before them takes one token a word, digit, mark and number.
    for example in (e for split in splits() for e in split):
        pieces = re.findall(r"\d|[^\W\d]+|[^\w\s]", example.text)
        assert len(pieces) + len(re.findall(r"\d+", example.text)) <= 45
        assert all(choice.isalpha() for choice in example.choices)


@pytest.mark.parametrize("rows", [0, -3, 100_001])
def test_a_number_of_rows_out_of_range_is_refused_in_words(rows):
    with pytest.raises(InputError, match=rf"chance/test cannot have {rows} rows: ask for 1 to 100,000"):
        chance_task(test_rows=rows)
    with pytest.raises(InputError, match=rf"chance/ood cannot have {rows} rows"):
        chance_ood(rows)
