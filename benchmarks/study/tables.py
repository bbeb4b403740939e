"""The study's tables, as lists of lines of cells and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from paired import MARGINS, Difference, Lines, Row
from questions import SCALED, WITHOUT_LABELS, detectors, main_cells, one_predictor, predictors

NAMES = {
    "map": "MAP", "mc-dropout": "MC dropout", "laplace": "Laplace", "tfb": "TFB", "isotropic": "isotropic noise",
    "ivon": "IVON", "blob elbo": "BLoB (elbo)", "blob": "BLoB", "swag": "SWAG", "multiswag": "MultiSWAG",
}  # fmt: skip
"""What a reader knows the methods by; ``blob elbo`` before ``blob``, with which it begins."""
IN_LOGITS = ("laplace",)
"""Methods whose draws are of logits, and cost no pass."""
TITLES = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE", "brier": "Brier", "auroc": "AUROC"}
MARGIN_WORDS = ", ".join(f"{TITLES[name]} {margin:g}" for name, margin in MARGINS.items())


def label(row: str) -> str:
    """Return a row's name, or words that begin with it, as a reader knows the method."""
    found = next((name for name in NAMES if row == name or row.startswith((f"{name} ", f"{name},"))), None)
    return row if found is None else NAMES[found] + row.removeprefix(found)


def markdown(table: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """Return a table in Markdown; the first columns are texts."""
    head, *body = ("| " + " | ".join(line) + " |" for line in table)
    rule = "|" + "---|" * texts + "---:|" * (len(table[0]) - texts)
    return "\n".join([head, rule, *body])


def spread(values: Sequence[float]) -> str:
    """Return a mean ± its standard deviation over the seeds; nothing of nothing."""
    if not values:
        return ""
    mean = f"{fmean(values):.3f}"
    return mean if len(values) < 2 else f"{mean}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{stdev(values):.3f}"


def cell_table(lines: Lines, cell: str, rows: Sequence[str]) -> list[list[str]]:
    """Return the main table of a cell: mean ± standard deviation over the seeds, a line a row and predictor."""
    scores = ("accuracy", "nll", "ece", "brier")
    table = [["", "seeds", *(TITLES[score] for score in scores)]]
    for name in rows:
        for predictor in predictors(name):
            row = Row(name, predictor)
            words = label(name if one_predictor(name) else f"{name}, {predictor}")
            cells = [spread(lines.values(cell, row, score)) for score in scores]
            table.append([words, str(len(lines.seeds(cell, name))), *cells])
    return table


def decision_table(lines: Lines, only: Sequence[str] = ()) -> list[list[str]]:
    """Return what each method costs, and its ECE and, in brackets, accuracy in each cell, averaged over the seeds.

    With names of rows ``only`` they are there, each by one predictor: its draws, if these are not the mean.
    """
    cells = main_cells(lines)
    table = [["", "trainings", "passes a row", *cells]]
    plain = [name for name in lines.names() if ", " not in name and SCALED not in name]
    for name in only or dict.fromkeys(["base", "map", f"map{SCALED}", f"map{WITHOUT_LABELS}", *plain]):
        runs = [line for (_, row, _), line in lines.by_run.items() if row == name]
        for predictor in predictors(name)[-1 if only else 0 :] if runs else ():
            passes = "1" if predictor == "mean" else _numbers(line["draws"] for line in runs)
            if name in IN_LOGITS:
                passes = "1, and one backward a choice"
            words = label(name if one_predictor(name) else f"{name}, {predictor}")
            scores = (_decided(lines, cell, Row(name, predictor)) for cell in cells)
            table.append([words, _numbers(line["passes"] for line in runs), passes, *scores])
    return table


def _numbers(values: Iterable[float]) -> str:
    """Return different numbers in words."""
    return " or ".join(f"{n:g}" for n in sorted(set(values)))


def _decided(lines: Lines, cell: str, row: Row) -> str:
    """Return ECE and accuracy of a row in a cell."""
    scores = [lines.values(cell, row, score) for score in ("ece", "accuracy")]
    return f"{fmean(scores[0]):.3f} ({fmean(scores[1]):.2f})" if scores[0] else ""


def by_draws(lines: Lines, cell: str, score: str) -> list[list[str]]:
    """Return a score of a cell's methods by the number of draws, averaged over the seeds, with the mean's beside it."""
    names = [name for name in lines.rows(cell) if ", " not in name and SCALED not in name]
    found = {name: values for name in names if (values := lines.by_draws(cell, name, score))}
    counts = sorted(set().union(*found.values()))
    table = [["", "mean", *map(str, counts)]]
    for name, values in found.items():
        mean = fmean(lines.values(cell, Row(name, "mean"), score))
        draws = (f"{values[count]:.3f}" if count in values else "" for count in counts)
        table.append([label(name), f"{mean:.3f}", *draws])
    return table


def detection_table(lines: Lines, rows: Sequence[str]) -> list[list[str]]:
    """Return AUROC by row and kind of uncertainty for every pair of a cell and foreign data, averaged over seeds."""
    pairs = [(cell, foreign) for cell in main_cells(lines) for foreign in lines.foreign(cell)]
    table = [["", "", *(f"{cell} / {foreign}" for cell, foreign in pairs)]]
    for row in detectors(rows):
        values = [spread(lines.values(cell, row, f"auroc {foreign}")) for cell, foreign in pairs]
        if any(values):
            table.append([label(row.name), row.kind, *values])
    return table


def difference_table(found: Sequence[tuple[str, Difference]]) -> list[list[str]]:
    """Return a question's differences as a table, a line a pair: better in bold, ``=`` where it is the same."""
    scores = list(dict.fromkeys(d.score for _, d in found))
    by_pair: dict[str, dict[str, Difference]] = {}
    for words, d in found:
        by_pair.setdefault(words, {})[d.score] = d
    table = [["", "cells", *(TITLES[score] for score in scores)]]
    for words, of_pair in by_pair.items():
        cells = len(next(iter(of_pair.values())).cells)
        table.append([label(words), str(cells), *(_difference(of_pair.get(score)) for score in scores)])
    return table


def _difference(d: Difference | None) -> str:
    """Return a difference, its interval and its verdict as a cell of a table."""
    if d is None:
        return ""
    text = f"{d.value:+.3f} [{d.low:+.3f},\N{NO-BREAK SPACE}{d.high:+.3f}]"
    return {"better": f"**{text}**", "worse": f"*{text} worse*", "same": f"{text} =", "open": text}[d.verdict]
