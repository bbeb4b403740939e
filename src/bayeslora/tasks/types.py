"""Examples, how they are put to a model, and the splits of a task: plain values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bayeslora._typing import Float, Int
from bayeslora.errors import InputError

ReadoutName = Literal["auto", "letters", "likelihood", "head"]
TaskKind = Literal["question", "blank", "class"]
Normalisation = Literal["sum", "characters", "tokens", "unconditional"]


@dataclass(frozen=True)
class Example:
    """One question with its choices, or one text with the classes it may belong to.

    Attributes:
        text: The question, sentence or text.
        choices: What can be answered; for a classification task the class names, the same for every example.
        label: Index of the right choice; None where it is not known.
        probs: The true probability of each choice, where the data were generated and it is known.
        columns: Name and text of each column that the template names besides ``{text}`` and ``{choices}``.
    """

    text: str
    choices: tuple[str, ...]
    label: int | None = None
    probs: tuple[float, ...] | None = None
    columns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Format:
    """How an example is put to a model and its answer read.

    Attributes:
        template: Python format string with ``{text}`` or the names of other columns of the data in braces and, for the
            letters readout, ``{choices}``. Empty: the default for the kind and the readout, filled in by
            ``resolve_format`` once the readout is known.
        readout: ``letters`` (softmax over the choices' letter tokens at the last position), ``likelihood`` (softmax
            over the log-likelihood of each choice's text), ``head`` (a classification head) or ``auto`` (``head`` for a
            model that has one, else ``likelihood`` for a split with classes and ``letters`` where the choices change
            from example to example).
        few_shot: Solved examples put before the question.
        max_length: Longest prompt in tokens; longer ones lose their beginning and are counted. None: the model's
            limit, beyond which a prompt is refused.
        kind: What the text is, which decides the default template: a ``question``, a sentence with a ``blank`` to
            fill, or a text whose ``class`` is asked for.
        normalisation: The likelihood readout's score of a choice, in training as in prediction: the ``sum`` of its
            tokens' log-probabilities; that sum for each four ``characters`` of its text, or for each of its ``tokens``;
            or the sum less the one after a prompt without the question (``unconditional``), see
            `bayeslora.tasks.templates.neutral_prompt`.
    """

    template: str
    readout: ReadoutName = "auto"
    few_shot: tuple[Example, ...] = ()
    max_length: int | None = None
    kind: TaskKind = "question"
    normalisation: Normalisation = "sum"


@dataclass(frozen=True)
class Split:
    """The examples of one split, with the format in which they are put to a model.

    Attributes:
        name: Task and split, such as ``openbookqa/test``; used in messages.
        examples: The examples, in the order of the predictions.
        format: How they are put to the model.
        classes: The class names of a classification task; None where the choices change from example to example.
    """

    name: str
    examples: tuple[Example, ...]
    format: Format
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        """Return the number of examples N."""
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        """Return an iterator over the examples."""
        return iter(self.examples)

    @property
    def labels(self) -> Int[Tensor, " N"]:
        """Index of the right choice for each example; -1 where it is not known."""
        return torch.tensor([-1 if e.label is None else e.label for e in self.examples], dtype=torch.long)

    @property
    def probs(self) -> Float[Tensor, "N C"] | None:
        """True probabilities of the choices, 0 for those that an example lacks; None unless all are known."""
        known = [e.probs for e in self.examples if e.probs is not None]
        if not known or len(known) < len(self.examples):
            return None
        widest = max(map(len, known))
        return torch.tensor([[*p, *[0.0] * (widest - len(p))] for p in known])

    @property
    def normalisation(self) -> Normalisation | None:
        """The normalisation of the choices' log-likelihoods; None if the format's readout surely has none."""
        likely = self.format.readout == "likelihood" or (self.format.readout == "auto" and self.classes is not None)
        return self.format.normalisation if likely else None

    def take(self, rows: Sequence[int]) -> Split:
        """Return the split with the given rows only, in the given order."""
        return replace(self, examples=tuple(self.examples[i] for i in rows))


@dataclass(frozen=True)
class Task:
    """A task: up to three splits of the same kind of example.

    Attributes:
        name: Name of the task.
        train: Examples to fit on; None for an evaluation-only task.
        validation: Held-out training examples, for early stopping and for choosing settings; never the test split.
        test: Examples to evaluate on.
    """

    name: str
    train: Split | None
    validation: Split | None
    test: Split | None

    @property
    def normalisation(self) -> Normalisation | None:
        """That of its splits."""
        return next((s.normalisation for s in (self.train, self.validation, self.test) if s is not None), None)


def present(split: Split | None, purpose: str) -> Split:
    """Return a split to fit or choose on, its rows labelled or not; refuse one that is missing or empty."""
    if split is None or not len(split):
        raise InputError(f"{purpose}, and the task has none; load it with validation=0.1, or give data with that split")
    return split


def labelled(split: Split | None, purpose: str) -> Split:
    """Return a split to fit or choose on; refuse one that is missing, too small, or not labelled throughout."""
    split = present(split, purpose)
    least = max(len(example.choices) for example in split)
    if len(split) < least:
        raise InputError(f"{purpose}, at least {least} of them, and {split.name} has {len(split)}")
    unknown = [i for i, example in enumerate(split) if example.label is None]
    if unknown:
        raise InputError(f"{purpose}, and row {unknown[0]} of {split.name} has no label")
    return split
