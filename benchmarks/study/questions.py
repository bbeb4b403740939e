"""The study's questions, and the comparisons that answer them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from paired import Difference, Lines, Row, corrected

SCALED = " + T"
WITHOUT_LABELS = " + T without labels"
DIVERGENCE = ", scaled by divergence"
TEMPERATURE = Row("map" + SCALED, "mean")
CALIBRATION = ("nll", "ece")
LONG = "-long"  # ends the name of a cell with few rows and as many steps as its plain one


@dataclass(frozen=True)
class Question:
    """A question with its comparisons: rows, scores and the cells over which they are averaged."""

    name: str
    asked: str
    compared: str  # what less what
    pairs: tuple[tuple[str, Row, Row], ...]  # what is compared in words, and the two rows
    scores: tuple[str, ...] = CALIBRATION
    averaged: bool = True  # whether the average over the cells is a comparison
    each_cell: bool = False  # whether every cell is one
    sizes: bool = False  # whether it is asked of cells, two or more, that differ in their number of training rows

    def differences(self, lines: Lines) -> list[tuple[str, Difference]]:
        """Return every comparison for which there are lines, in words and in numbers, corrected together."""
        found = []
        cells = by_size(lines) if self.sizes else main_cells(lines)
        for words, first, second in self.pairs:
            having = [cell for cell in cells if lines.common(cell, first, second)]
            if len(having) < (2 if self.sizes else 1):
                continue
            groups = [having] if self.averaged else []
            groups += [[cell] for cell in having if self.each_cell and (len(having) > 1 or not self.averaged)]
            for group in groups:
                where = "" if len(group) > 1 or not self.each_cell else f", {group[0]}"
                found += [(words + where, lines.compared(first, second, score, group)) for score in self.scores]
        fixed = corrected([difference for _, difference in found])
        return [(words, difference) for (words, _), difference in zip(found, fixed, strict=True)]


def main_cells(lines: Lines) -> list[str]:
    """Return the cells but for those that repeat another with more or fewer training rows."""
    return [cell for cell in lines.cells if _plain(cell) == cell]


def by_size(lines: Lines) -> list[str]:
    """Return the cells that differ in their number of training rows, or steps, alone, fewest rows first."""
    repeated = {_plain(cell) for cell in lines.cells if _plain(cell) != cell}
    return sorted((cell for cell in lines.cells if _plain(cell) in repeated), key=lines.train_rows)


def _plain(cell: str) -> str:
    """Return a cell's name without its number of training rows, and without what says that it trains for longer."""
    return re.sub(rf"-\d+({LONG})?$", "", cell)


def questions(lines: Lines) -> Iterator[Question]:
    """Yield the questions that are asked of predictors: of the methods that the lines have."""
    rows = lines.names()
    methods = [row for row in rows if " + T" not in row and ", " not in row and row not in ("map", "base")]
    noisy = [m for m in methods if m not in ("mc-dropout", "laplace")]
    yield Question(
        "draws", "Does the mean do it, or the draws?", "The draws less the mean.",
        tuple((m, Row(m, "draws"), Row(m, "mean")) for m in noisy if "mean" in predictors(m)),
        ("accuracy", *CALIBRATION),
    )  # fmt: skip
    yield Question(
        "isotropic", "Does it matter where the noise is?",
        "The draws less those of isotropic noise of the same average variance around the same mean.",
        tuple((m, Row(m, "draws"), Row(f"{m}, isotropic of the same variance", "draws")) for m in ("ivon", "blob")),
    )  # fmt: skip
    yield Question(
        "matched", "And against noise of the same cost?",
        "The draws less those of isotropic noise whose single draws cost as much NLL on the validation rows.",
        tuple((m, Row(m, "draws"), Row(f"{m}, isotropic of the same cost", "draws")) for m in ("ivon", "blob")),
    )  # fmt: skip
    yield Question(
        "temperature", "What does a method give beyond one temperature?",
        "Each method, and each with a temperature of its own, less MAP with one; all fitted on labelled rows.",
        tuple((f"{m}, draws", Row(m, "draws"), TEMPERATURE) for m in methods)
        + tuple((f"{m}{SCALED}, draws", Row(m + SCALED, "draws"), TEMPERATURE) for m in methods),
        ("accuracy", *CALIBRATION),
    )  # fmt: skip
    yield Question(
        "without labels", "Does a temperature need labels?",
        "Fitted without them, where tuned and base agree, less fitted with them.",
        (
            ("MAP", Row("map" + WITHOUT_LABELS, "mean"), TEMPERATURE),
            *((f"{m}, draws", Row(m + WITHOUT_LABELS, "draws"), Row(m + SCALED, "draws")) for m in methods),
        ),
        each_cell=True,
    )  # fmt: skip
    yield Question(
        "multiswag", "An ensemble, or MultiSWAG?",
        "At about the same cost of training: five members less MultiSWAG of three; on SmolLM2 three less two.",
        (("ensemble less MultiSWAG", Row("ensemble", "draws"), Row("multiswag", "draws")),),
        ("accuracy", *CALIBRATION), each_cell=True,
    )  # fmt: skip
    yield Question(
        "divergence", "Does a scale by divergence beat each method's own?",
        "The noise scaled by the same divergence on unlabelled rows, less the method's own.",
        tuple((m, Row(m + DIVERGENCE, "draws"), Row(m, "draws")) for m in noisy), each_cell=True,
    )  # fmt: skip
    yield Question(
        "count", "How many draws?", "So many of the draws less all ten; the intervals are over the seeds alone.",
        tuple((f"{m}, {n}", Row(m, f"{n} draws"), Row(m, "10 draws")) for m in methods for n in (1, 3, 5)),
    )  # fmt: skip
    yield Question(
        "size", "How much data?",
        "Each method less MAP with a temperature, by the number of training rows. The epochs are the same, so that "
        "fewer rows are fewer steps; `long`: as many steps as with 200 rows.",
        tuple((m, Row(m, "draws"), TEMPERATURE) for m in methods),
        ("accuracy", *CALIBRATION), averaged=False, each_cell=True, sizes=True,
    )  # fmt: skip
    yield Question(
        "foreign", "What detects foreign data?", "AUROC less that of MAP's entropy, averaged over the foreign sets.",
        tuple((f"{row.name}, {row.kind}", row, Row("map", "mean")) for row in detectors(["map", *methods])[1:]),
        ("auroc",),
    )  # fmt: skip


def detectors(rows: Sequence[str]) -> list[Row]:
    """Return the ways to tell foreign data by some rows: MAP's entropy is the first of MAP."""
    more = ("likelihood ratio", "drift")
    kinds = {"map": ("entropy", *more, "prompt ratio"), "base": ("entropy",)}
    every = ("entropy", "mutual information", *more)
    return [main_row(row, kind) for row in rows for kind in kinds.get(row, every)]


def main_row(name: str, kind: str = "entropy") -> Row:
    """Return a row with the predictor that it is known by: its draws, where these are not the mean."""
    return Row(name, predictors(name)[-1], kind)


def one_predictor(row: str) -> bool:
    """Return whether a row's mean and draws are the same."""
    return row.split(" + T")[0] in ("map", "base")


def predictors(row: str) -> tuple[str, ...]:
    """Return the predictors of a row that a table shows; where the mean is MAP's it is left out."""
    mapped = ("mc-dropout", "laplace", "tfb", "isotropic", "ensemble", "multiswag")
    if one_predictor(row):
        return ("mean",)
    return ("draws",) if row.startswith(mapped) or ", " in row else ("mean", "draws")
