"""The untuned base in a comparison: it answers each split once, for all methods and seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

from bayeslora.comparison.cached_runs import CachedRuns, predicted_by, stored
from bayeslora.errors import InputError
from bayeslora.metrics.prediction import Prediction
from bayeslora.params import read
from bayeslora.posteriors import Draws, Point
from bayeslora.prediction.base import asking_base, check_base_answers
from bayeslora.tasks.types import Split
from bayeslora.training import keys

BASE = "base"
"""What its row is called."""


@final
@dataclass(frozen=True)
class Witness:
    """What the base says, split by split, each made when it is first asked for."""

    runs: CachedRuns
    answers: dict[int, tuple[Prediction, int | None]] = field(default_factory=dict)  # by the split's identity

    def of(self, split: Split) -> tuple[Prediction, int | None]:
        """Return the base's answers to a split, as one draw, and the memory that they took."""
        if id(split) not in self.answers:
            self.answers[id(split)] = _answers(self.runs, split)
        return self.answers[id(split)]

    def beside(self, prediction: Prediction, split: Split) -> Prediction:
        """Return a method's prediction of a split with the base's answers."""
        return replace(prediction, base_log_probs=self.of(split)[0].log_probs[0])


def witness(runs: CachedRuns) -> Witness | None:
    """Return the base as a witness; where it has no answers, say so and return None."""
    try:
        check_base_answers(runs.model)
    except InputError as error:
        runs.report(f"no row {BASE}: {error}")
        return None
    return Witness(runs)


def check_names(methods: Mapping[str, object]) -> None:
    """Refuse a method that is called as the base's row is."""
    if BASE in methods:
        raise InputError(f"a method is called {BASE}, as the row of the untuned model is; give it another label")


def _answers(runs: CachedRuns, split: Split) -> tuple[Prediction, int | None]:
    """Return the base's answers to a split, from their file if they are there already."""
    depends: keys.Parts = {
        "model": runs.inputs["model"], "tokenizer": runs.inputs["tokenizer"], "rows": keys.of_rows(split),
    }  # fmt: skip

    def make() -> Prediction:
        """Pass the split."""
        with asking_base(runs.model, read(runs.model)) as params:
            return predicted_by(runs, Point(params), split, Draws(1))

    stem = f"{BASE}-{re.sub('[^A-Za-z0-9_-]+', '-', split.name)}"
    words = f"the {BASE} answers {split.name} ({len(split)} rows)"
    prediction, memory = stored(runs, stem, depends, words, make)
    return replace(prediction, mean_log_probs=None), memory
