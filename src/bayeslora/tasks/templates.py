"""How an example becomes a prompt and an answer: templates, their defaults, and rendering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from string import Formatter, ascii_uppercase
from typing import Literal, get_args

from bayeslora.errors import InputError, listed
from bayeslora.files import check_json
from bayeslora.tasks.types import Example, Format, Normalisation, Split, TaskKind

ConcreteReadout = Literal["letters", "likelihood", "head"]

LETTERS = ascii_uppercase
CHARACTERS_PER_TOKEN = 4
"""Characters that count as one token where likelihoods are set in relation to characters: about right for English."""
MAX_PLACEHOLDERS = 100

_BLANK = "Fill in the blank (_) in the sentence.\nSentence: {text}\n"

DEFAULT_TEMPLATES: Mapping[TaskKind, Mapping[ConcreteReadout, str]] = {
    "question": {
        "letters": "Question: {text}\n{choices}\nAnswer:",
        "likelihood": "Question: {text}\nAnswer:",
        "head": "Question: {text}\nAnswer:",
    },
    "blank": {
        "letters": _BLANK + "{choices}\nAnswer:",
        "likelihood": _BLANK + "Answer:",
        "head": _BLANK + "Answer:",
    },
    "class": {
        "letters": "Text: {text}\n{choices}\nAnswer:",
        "likelihood": "Text: {text}\nLabel:",
        "head": "{text}",
    },
}

_CONCRETE: Mapping[str, ConcreteReadout] = {"letters": "letters", "likelihood": "likelihood", "head": "head"}


def check_template(template: str, readout: str) -> None:
    """Refuse a template that cannot be filled for a readout; empty means the default and is accepted."""
    if not template:
        return
    shown = repr(template)[:200]
    try:
        check_json(template)
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"The template {shown} is malformed ({error}): write {{{{ for a brace") from None
    fields = [name for _, name, _, _ in parts if name is not None]
    plain = all(not spec and conversion is None for _, _, spec, conversion in parts)
    if "" in fields or not plain:
        named = "a placeholder {} without a name" if "" in fields else "a conversion or a format specification"
        raise InputError(
            f"The template {shown} has {named}: use only {{text}}, {{choices}} and names of columns in braces"
        )
    if not set(fields) - {"choices"}:
        raise InputError(
            f"The template {shown} has no {{text}} and no other column: say where the question or text goes"
        )
    if len(fields) > MAX_PLACEHOLDERS:
        raise InputError(f"The template {shown} has {len(fields)} placeholders: {MAX_PLACEHOLDERS} are the most")
    if readout == "letters" and "choices" not in fields:
        raise InputError(
            f"The template {shown} has no {{choices}}, which the letters readout needs: add it, or choose "
            "readout='likelihood'"
        )


def placeholders(template: str) -> tuple[str, ...]:
    """Return the names that a template has in braces, each once; the default template has ``{text}``."""
    if not template:
        return ("text",)
    return tuple(dict.fromkeys(name for _, name, _, _ in Formatter().parse(template) if name is not None))


def template_columns(template: str) -> tuple[str, ...]:
    """Return the columns that a template names besides ``{text}`` and ``{choices}``."""
    return tuple(name for name in placeholders(template) if name not in ("text", "choices"))


def default_normalisation(readout: str) -> Normalisation:
    """Return the normalisation of tasks whose user names none: ``tokens`` where answers may be read by likelihood."""
    return "tokens" if readout in ("auto", "likelihood") else "sum"


def check_normalisation(normalisation: str, readout: str) -> None:
    """Refuse a normalisation that does not exist, or that a readout does not have; ``auto`` may have any."""
    known = get_args(Normalisation)
    if normalisation not in known:
        raise InputError(f"The normalisation {normalisation!r} is unknown: give one of {', '.join(known)}")
    if normalisation != "sum" and readout not in ("auto", "likelihood"):
        raise InputError(
            f"The readout {readout!r} has no normalisation {normalisation!r}: use readout='likelihood', or "
            "normalisation='sum'"
        )


def resolve_format(source: Split | Format, readout: str) -> Format:
    """Return the format with this readout and, where its template is empty, the default of its kind and readout."""
    fmt = source.format if isinstance(source, Split) else source
    concrete = _CONCRETE.get(readout)
    if concrete is None:
        raise InputError(f"The readout {readout!r} cannot be used: give one of {', '.join(_CONCRETE)}")
    template = fmt.template or DEFAULT_TEMPLATES[fmt.kind][concrete]
    check_template(template, concrete)
    if fmt.readout != "auto":
        check_normalisation(fmt.normalisation, fmt.readout)
    normalisation = fmt.normalisation if concrete == "likelihood" else "sum"
    return replace(fmt, template=template, readout=concrete, normalisation=normalisation)


def neutral_prompt(fmt: Format) -> str:
    """Return what the template of a resolved format has after its last placeholder, or else ``Answer:``."""
    end = ""
    for literal, name, _, _ in Formatter().parse(fmt.template):
        end = end + literal if name is None else ""
    return end.strip() or "Answer:"


def answer_text(example: Example, index: int, readout: str) -> str:
    """Return what follows the prompt when a choice is the answer: a space and its letter or, for others, its text."""
    if not 0 <= index < len(example.choices):
        raise InputError(f"There is no choice {index} among the {len(example.choices)} of {example.text[:60]!r}")
    if readout == "letters":
        _check_letters(example)
        return " " + LETTERS[index]
    return " " + example.choices[index]


def render(example: Example, fmt: Format) -> str:
    """Return the prompt: the solved few-shot examples, then the example, with blank lines between them."""
    if not fmt.template or fmt.readout == "auto":
        raise InputError("The format's readout is not settled: call resolve_format before rendering")
    parts = []
    for shot in fmt.few_shot:
        if shot.label is None:
            raise InputError(f"The few-shot example {shot.text[:60]!r} has no label: give solved examples")
        parts.append(_fill(shot, fmt) + answer_text(shot, shot.label, fmt.readout))
    return "\n\n".join([*parts, _fill(example, fmt)])


def _fill(example: Example, fmt: Format) -> str:
    """Return the template filled with one example, without trailing spaces."""
    values = {**dict(example.columns), "text": example.text, "choices": ""}
    if "choices" in placeholders(fmt.template):
        _check_letters(example)
        values["choices"] = "\n".join(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(example.choices))
    lacking = [name for name in template_columns(fmt.template) if name not in values]
    if lacking:
        has = listed(name for name, _ in example.columns) or "none"
        raise InputError(
            f"{example.text[:60]!r} has no column {lacking[0]!r}, which the template names (its columns are {has}): "
            "give rows with that column, or another template"
        )
    parts = Formatter().parse(fmt.template)  # not str.format, which would read attributes
    return "".join(literal + ("" if name is None else values[name]) for literal, name, _, _ in parts).rstrip(" \t")


def _check_letters(example: Example) -> None:
    """Refuse more choices than there are letters."""
    if len(example.choices) > len(LETTERS):
        raise InputError(
            f"{example.text[:60]!r} has {len(example.choices)} choices, more than the {len(LETTERS)} letters: choose "
            "readout='likelihood' and a template without {choices}"
        )
