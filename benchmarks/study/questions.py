"""The study's questions, and the tables that answer them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from paired import MARGINS, Difference, Lines, Row, corrected

TITLES = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE", "brier": "Brier", "auroc": "AUROC"}
SCALED = " + T"
WITHOUT_LABELS = " + T without labels"
DIVERGENCE = ", scaled by divergence"
TEMPERATURE: Row = ("map" + SCALED, "mean")
CALIBRATION = ("nll", "ece")


@dataclass(frozen=True)
class Question:
    """A question with its comparisons: rows, scores and the cells over which they are averaged."""

    name: str
    asked: str
    pairs: tuple[tuple[str, Row, Row], ...]  # what is compared in words, and the two rows
    scores: tuple[str, ...] = CALIBRATION
    each_cell: bool = False  # whether every cell is a comparison of its own, too

    def differences(self, lines: Lines, cells: Sequence[str]) -> list[tuple[str, Difference]]:
        """Return every comparison for which there are lines, in words and in numbers, corrected together."""
        found = []
        for words, first, second in self.pairs:
            having = [cell for cell in cells if lines.common(cell, (first[0], second[0]))]
            if not having:
                continue
            groups = [having, *([cell] for cell in having if self.each_cell and len(having) > 1)]
            for group in groups:
                where = "" if len(group) > 1 or not self.each_cell else f", {group[0]}"
                found += [(words + where, lines.compared(first, second, score, group)) for score in self.scores]
        fixed = corrected([difference for _, difference in found])
        return [(words, difference) for (words, _), difference in zip(found, fixed, strict=True)]


def questions(lines: Lines) -> Iterator[Question]:
    """Yield the questions that are asked of predictors: of the methods that the lines have."""
    rows = list(dict.fromkeys(row for cell in lines.cells for row in lines.rows(cell)))
    methods = [row for row in rows if " + T" not in row and ", " not in row and row not in ("map", "base")]
    noisy = [m for m in methods if m not in ("mc-dropout", "laplace")]
    yield Question(
        "draws", "Does the mean do it, or the draws?",
        tuple((m, (m, "draws"), (m, "mean")) for m in noisy if m not in ("ensemble", "multiswag", "tfb", "isotropic")),
        ("accuracy", *CALIBRATION),
    )  # fmt: skip
    yield Question(
        "isotropic", "Does it matter where the noise is? IVON's and BLoB's draws, less those of isotropic noise of the "
        "same average variance around the same mean.",
        tuple((m, (m, "draws"), (f"{m}, isotropic of the same variance", "draws")) for m in ("ivon", "blob")),
    )  # fmt: skip
    yield Question(
        "matched", "And of the noise whose single draws cost as much NLL on the validation rows?",
        tuple((m, (m, "draws"), (f"{m}, isotropic of the same cost", "draws")) for m in ("ivon", "blob")),
    )  # fmt: skip
    yield Question(
        "temperature", "What does a method give beyond one temperature for MAP, fitted on labelled validation rows?",
        tuple((f"{m}, draws", (m, "draws"), TEMPERATURE) for m in methods)
        + tuple((f"{m}{SCALED}, draws", (m + SCALED, "draws"), TEMPERATURE) for m in methods),
        ("accuracy", *CALIBRATION),
    )  # fmt: skip
    yield Question(
        "without labels", "And beyond one fitted without labels, on rows where MAP and the base agree?",
        (
            ("MAP", ("map" + WITHOUT_LABELS, "mean"), TEMPERATURE),
            *((f"{m}, draws", (m + WITHOUT_LABELS, "draws"), (m + SCALED, "draws")) for m in methods),
        ),
        each_cell=True,
    )  # fmt: skip
    yield Question(
        "multiswag", "Five members, or MultiSWAG of three at about the same cost of training (5 and 4.5 runs)?",
        (("ensemble of 5 less MultiSWAG of 3", ("ensemble", "draws"), ("multiswag", "draws")),),
        ("accuracy", *CALIBRATION), each_cell=True,
    )  # fmt: skip
    yield Question(
        "divergence", "Does a scale chosen by divergence beat each method's own?",
        tuple((m, (m + DIVERGENCE, "draws"), (m, "draws")) for m in noisy), each_cell=True,
    )  # fmt: skip


def cell_table(lines: Lines, cell: str, rows: Sequence[str]) -> list[list[str]]:
    """Return the main table of a cell: mean ± standard deviation over the seeds, a line a row and predictor."""
    scores = ("accuracy", "nll", "ece", "brier")
    table = [["", "seeds", *(TITLES[score] for score in scores)]]
    for name in rows:
        for predictor in predictors(lines, cell, name):
            row = (name, predictor)
            label = name if one_predictor(name) else f"{name}, {predictor}"
            cells = [spread(lines.values(cell, row, score)) for score in scores]
            table.append([label, str(len(lines.seeds(cell, name))), *cells])
    return table


def one_predictor(row: str) -> bool:
    """Return whether a row's mean and draws are the same."""
    return row.split(" + T")[0] in ("map", "base")


def predictors(lines: Lines, cell: str, row: str) -> tuple[str, ...]:
    """Return the predictors of a row that a table shows; where the mean is MAP's it is left out."""
    mapped = ("mc-dropout", "laplace", "tfb", "isotropic", "ensemble", "multiswag")
    if one_predictor(row):
        return ("mean",)
    return ("draws",) if row.startswith(mapped) or ", " in row else ("mean", "draws")


def detection_table(lines: Lines, rows: Sequence[str]) -> list[list[str]]:
    """Return AUROC by row and kind of uncertainty for every pair of a cell and foreign data, averaged over seeds."""
    kinds = ("entropy", "mutual information", "likelihood ratio", "drift", "prompt ratio")
    pairs = [(cell, foreign) for cell in lines.cells for foreign in foreign_of(lines, cell)]
    table = [["", "", *(f"{cell} / {foreign}" for cell, foreign in pairs)]]
    for name in rows:
        for kind in kinds:
            values = [_detection(lines, cell, name, foreign, kind) for cell, foreign in pairs]
            if any(values):
                table.append([name, kind, *values])
    return table


def foreign_of(lines: Lines, cell: str) -> list[str]:
    """Return the names of a cell's foreign sets."""
    return next(list(line["config"]["foreign"]) for (of, _, _), line in lines.by_run.items() if of == cell)


def _detection(lines: Lines, cell: str, name: str, foreign: str, kind: str) -> str:
    """Return one number of the detection table; nothing where it cannot be told."""
    seeds = lines.seeds(cell, name)
    if not seeds or (kind == "mutual information" and one_predictor(name)):
        return ""
    if kind in ("likelihood ratio", "drift") and (name == "base" or "base" not in lines.rows(cell)):
        return ""
    if kind == "prompt ratio" and not all(lines.by_run[cell, name, s]["rows"].get(kind) for s in seeds):
        return ""
    row = (name, "mean" if one_predictor(name) else "draws")
    return spread(lines.values(cell, row, f"auroc {foreign} {kind}"))


def difference_table(found: Sequence[tuple[str, Difference]]) -> list[list[str]]:
    """Return a question's differences as a table, a line a pair: better in bold, ``=`` where it is the same."""
    scores = list(dict.fromkeys(d.score for _, d in found))
    by_pair: dict[str, dict[str, Difference]] = {}
    for words, d in found:
        by_pair.setdefault(words, {})[d.score] = d
    table = [["", "cells", *(TITLES[score] for score in scores)]]
    for words, of_pair in by_pair.items():
        cells = len(next(iter(of_pair.values())).cells)
        table.append([words, str(cells), *(_difference(of_pair.get(score)) for score in scores)])
    return table


def _difference(d: Difference | None) -> str:
    """Return a difference, its interval and its verdict as a cell of a table."""
    if d is None:
        return ""
    text = f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
    return {"better": f"**{text}**", "worse": f"*{text} worse*", "same": f"{text} =", "open": text}[d.verdict]


def spread(values: Sequence[float]) -> str:
    """Return a mean ± its standard deviation over the seeds."""
    mean = f"{fmean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {stdev(values):.3f}"


def markdown(table: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """Return a table in Markdown; the first columns are texts."""
    head, *body = ("| " + " | ".join(line) + " |" for line in table)
    rule = "|" + "---|" * texts + "---:|" * (len(table[0]) - texts)
    return "\n".join([head, rule, *body])


def by_draws(lines: Lines, score: str, of: Callable[[str], bool]) -> list[list[str]]:
    """Return a score by the number of draws, averaged over cells and seeds, with the mean's beside it."""
    rows = list(dict.fromkeys(row for cell in lines.cells for row in lines.rows(cell) if of(row)))
    counts = sorted({int(c) for line in lines.by_run.values() for c in line["by draws"]})
    table = [["", "mean", *map(str, counts)]]
    for name in rows:
        runs = [line for (_, row, _), line in lines.by_run.items() if row == name and line["by draws"]]
        values = [[run["by draws"][str(c)][score] for run in runs if str(c) in run["by draws"]] for c in counts]
        if not runs:
            continue
        mean = fmean(run["metrics"]["mean"][score] for run in runs)
        table.append([name, f"{mean:.3f}", *(f"{fmean(v):.3f}" if len(v) == len(runs) else "" for v in values)])
    return table


MARGIN_WORDS = ", ".join(f"{TITLES[name]} {margin:g}" for name, margin in MARGINS.items())
