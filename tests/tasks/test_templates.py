"""Templates, prompts and answers."""

from typing import get_args

import pytest

from bayeslora.errors import InputError
from bayeslora.tasks import Example, Format, Split, TaskKind, answer_text, render, resolve_format
from bayeslora.tasks.templates import DEFAULT_TEMPLATES

READOUTS = ("letters", "likelihood", "head")
QUESTION = Example("What is wet?", ("sand", "water"), 1)


def test_letters_prompt_lists_the_choices_and_its_answer_is_a_letter():
    fmt = resolve_format(Format(""), "letters")
    assert render(QUESTION, fmt) == "Question: What is wet?\nA. sand\nB. water\nAnswer:"
    assert answer_text(QUESTION, 1, "letters") == " B"


def test_likelihood_prompt_hides_the_choices_and_its_answer_is_the_text():
    fmt = resolve_format(Format(""), "likelihood")
    assert render(QUESTION, fmt) == "Question: What is wet?\nAnswer:"
    assert answer_text(QUESTION, 1, "likelihood") == " water"


def test_head_prompt_of_a_class_task_is_the_text_alone():
    fmt = resolve_format(Format("", kind="class"), "head")
    assert render(Example("a fine film", ("bad", "good")), fmt) == "a fine film"


def test_blank_prompt_says_to_fill_the_blank():
    assert render(QUESTION, resolve_format(Format("", kind="blank"), "letters")).startswith("Fill in the blank (_)")


@pytest.mark.parametrize("kind", get_args(TaskKind))
@pytest.mark.parametrize("readout", READOUTS)
def test_every_default_is_accepted_as_a_template_of_ones_own(kind, readout):
    default = resolve_format(Format("", kind=kind), readout)
    assert resolve_format(Format(default.template, kind=kind), readout) == default
    assert set(DEFAULT_TEMPLATES) == set(get_args(TaskKind))


def test_a_split_resolves_as_its_format_does():
    fmt = Format("", max_length=9, kind="blank")
    assert resolve_format(Split("s", (QUESTION,), fmt), "letters") == resolve_format(fmt, "letters")


def test_few_shot_prompt_is_solved_examples_then_the_question():
    shot = Example("What is dry?", ("sand", "water"), 0)
    fmt = resolve_format(Format("Q: {text}\nA:", few_shot=(shot, shot)), "likelihood")
    assert render(QUESTION, fmt) == "Q: What is dry?\nA: sand\n\nQ: What is dry?\nA: sand\n\nQ: What is wet?\nA:"


def test_braces_in_the_text_are_kept():
    assert render(Example("f{x}", ("a", "b")), Format("{text}", "likelihood")) == "f{x}"


def test_prompt_does_not_end_in_a_space():
    assert render(QUESTION, Format("{text} => ", "likelihood")) == "What is wet? =>"


@pytest.mark.parametrize(
    ("template", "readout", "said"),
    [
        ("Answer:", "likelihood", "no {text}"),
        ("{text}", "letters", "no {choices}"),
        ("{choices}", "likelihood", "no {text} and no other column"),
        ("{text} {}", "likelihood", "a placeholder {} without a name"),
        ("{premise:3}", "likelihood", "format specification"),
        ("{text!r}", "likelihood", "conversion"),
        ("{text", "likelihood", "malformed"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template, readout, said):
    with pytest.raises(InputError) as caught:
        resolve_format(Format(template), readout)
    assert said in str(caught.value)


@pytest.mark.parametrize("readout", ["auto", "letter"])
def test_only_the_three_readouts_resolve(readout):
    with pytest.raises(InputError, match="give one of letters, likelihood, head"):
        resolve_format(Format(""), readout)


@pytest.mark.parametrize("fmt", [Format("", "letters"), Format("{text}", "auto")])
def test_rendering_an_unresolved_format_is_refused(fmt):
    with pytest.raises(InputError, match="resolve_format"):
        render(QUESTION, fmt)


def test_letters_are_refused_beyond_26_choices():
    many = Example("which?", tuple(f"c{i}" for i in range(27)))
    with pytest.raises(InputError, match="27 choices"):
        render(many, resolve_format(Format(""), "letters"))
    with pytest.raises(InputError, match="27 choices"):
        answer_text(many, 0, "letters")


@pytest.mark.parametrize("index", [-1, 2])
def test_an_answer_outside_the_choices_is_refused(index):
    with pytest.raises(InputError, match="no choice"):
        answer_text(QUESTION, index, "letters")


def test_a_few_shot_example_without_a_label_is_refused():
    with pytest.raises(InputError, match="no label"):
        render(QUESTION, Format("{text}", "likelihood", few_shot=(Example("x", ("a", "b")),)))


def test_a_template_takes_columns_by_their_names_and_reads_no_attributes():
    example = Example("t", ("a", "b"), columns=(("premise", "Rain {x}."), ("a.b", "dot"), ("the day", "Monday")))
    fmt = resolve_format(Format("{premise} {a.b} {the day}: {text}\n{choices}"), "letters")
    assert render(example, fmt) == "Rain {x}. dot Monday: t\nA. a\nB. b"
    with pytest.raises(InputError, match=r"no column 'text\.__class__', which the template names \(.* premise, a\.b"):
        render(example, Format("{text.__class__}", "likelihood"))


def test_solved_examples_fill_the_same_columns():
    shot = Example("", ("yes", "no"), 0, columns=(("premise", "p1"),))
    fmt = Format("{premise}?", "likelihood", few_shot=(shot,))
    assert render(Example("", ("yes", "no"), columns=(("premise", "p2"),)), fmt) == "p1? yes\n\np2?"
