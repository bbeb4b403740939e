"""Write what the study found into the docs: its page, the methods' pages, and the figures.

    python benchmarks/study/report.py                     # README.md, pages and figures in docs
    python benchmarks/study/report.py --json study.json   # the numbers alone, and the verdicts

A row of a cell is told of once it has been run under three seeds (``--least-seeds``). Only what stands between ``<!--
study:begin NAME -->`` and ``<!-- study:end -->`` is replaced. Nothing is trained, and the same lines give the same
text.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import figures
import lines
from cells import STUDY, Cell, read_study
from goals import goals_table
from paired import Difference, Lines
from questions import SCALED, WITHOUT_LABELS, Question, main_cells, questions
from tables import (
    MARGIN_WORDS,
    by_draws,
    cell_table,
    decision_table,
    detection_table,
    difference_table,
    markdown,
)

PICTURES = {
    "temperature": ("![NLL by ECE of every method](assets/study-calibration.png)",),
    "count": ("![NLL by the number of draws](assets/study-draws.png)",),
    "size": ("![NLL by training rows](assets/study-data.png)",),
}
"""Figures that belong to a question."""
README = ("map", f"map{SCALED}", "ensemble", "swag", "laplace", "tfb", "ivon", "blob")
"""Rows of the table in README.md."""
ROOT = Path(__file__).parents[2]
PAGES = {"multiswag": "swag", "blob elbo": "blob", "mc-dropout": "mc_dropout"}
"""Methods that are told about on another page than that of their name."""
LEGEND = (
    "Differences with their 95 % intervals: the first named row less the other, so that less is better for NLL and "
    f"ECE. `=`: the interval is within the margin that matters ({MARGIN_WORDS}); else bold: better, in italics: worse "
    "(p by Holm below .05 in the question); else the data do not tell."
)
Line = Mapping[str, Any]
Answered = list[tuple[Question, list[tuple[str, Difference]]]]


def filled(text: str, name: str, content: str) -> str:
    """Return a page with the part of a name replaced; raises ``ValueError`` unless it has one."""
    pattern = re.compile(rf"(<!-- study:begin {re.escape(name)} -->\n).*?(<!-- study:end -->)", re.DOTALL)
    text, count = pattern.subn(lambda found: f"{found[1]}{content.rstrip()}\n{found[2]}", text)
    if count != 1:
        raise ValueError(f"{count} parts <!-- study:begin {name} --> where one is to be filled in")
    return text


def enough(every: Sequence[Line], least: int) -> list[Line]:
    """Return the lines of the rows that a cell has under so many seeds or more, of cells that have MAP's."""
    counts = Counter((line["cell"], line["row"]) for line in every)
    return [line for line in every if min(counts[line["cell"], row] for row in ("map", line["row"])) >= least]


def progress(every: Sequence[Line], cells: Sequence[Cell], seeds: int) -> str:
    """Return what each cell is, and how much of it has been run."""
    done = Counter((line["cell"], line["method"], line["seed"]) for line in every)
    table = [["cell", "training rows", "validation", "test", "foreign", "draws", "runs"]]
    for cell in cells:
        config = cell.config
        runs = sum(name == cell.name for name, _, _ in done)
        sizes = [str(config[name]) for name in ("train_rows", "validation", "test_rows")]
        foreign = f"{', '.join(config['foreign'])} ({config['foreign_rows']} rows each)"
        draws = f"{config['draws']['count']} {config['draws'].get('sampling', 'independent')}"
        table.append([cell.name, *sizes, foreign, draws, f"{runs} of {len(cell.entries) * seeds}"])
    return markdown(table)


def study_page(found: Lines, answered: Answered, runs: str) -> str:
    """Return the part of the study's page that is made of the lines."""
    parts = ["## Runs", "", runs, ""]
    if not found.cells:
        return "\n".join(parts)
    parts += ["## Answers", "", LEGEND, ""]
    for question, differences in answered:
        if differences:
            parts += [f"### {question.asked}", "", answer(question, differences), ""]
            parts += [line for picture in PICTURES.get(question.name, ()) for line in (picture, "")]
    goals = goals_table(found)
    if len(goals) > 1:
        parts += ["### Hoped for", "", markdown(goals, texts=3), ""]
    return "\n".join(parts)


def answer(question: Question, differences: Sequence[tuple[str, Difference]]) -> str:
    """Return what was compared for a question, how often each verdict was given, and the differences."""
    return f"{question.compared} {verdicts(differences)}\n\n{markdown(difference_table(differences))}"


def tables_page(found: Lines) -> str:
    """Return the part of the page of tables that is made of the lines: each row of each cell, and detection."""
    methods = [row for row in found.names() if SCALED not in row]
    parts = []
    for cell in found.cells:
        parts += [f"## {cell}", "", markdown(cell_table(found, cell, found.rows(cell))), ""]
    parts += ["## NLL by the number of draws", "", "Averaged over the seeds.", ""]
    for cell in main_cells(found):
        parts += [f"### {cell}", "", markdown(by_draws(found, cell, "nll")), ""]
    parts += ["## Detection", "", "AUROC of telling the foreign rows from the test rows.", ""]
    return "\n".join([*parts, markdown(detection_table(found, methods), texts=2)])


def verdicts(differences: Sequence[tuple[str, Difference]]) -> str:
    """Return how often each verdict was given, in words."""
    counts = {name: sum(d.verdict == name for _, d in differences) for name in ("better", "same", "open", "worse")}
    return f"{len(differences)} comparisons: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + "."


def method_part(found: Lines, methods: Sequence[str]) -> str:
    """Return the table of a page of methods: their rows in every cell beside MAP's."""
    parts = []
    for cell in found.cells:
        own = [r for r in found.rows(cell) for m in methods if r == m or r.startswith((f"{m}, ", f"{m} + "))]
        if own:
            shown = ["map", f"map{SCALED}", f"map{WITHOUT_LABELS}", *own]
            shown = [row for row in dict.fromkeys(shown) if row in found.rows(cell)]
            parts += [f"{cell}:", "", markdown(cell_table(found, cell, shown)), ""]
    return "\n".join(["Mean ± standard deviation over the seeds; see [the study](../study.md).", "", *parts])


def pages(found: Lines, answered: Answered) -> dict[tuple[str, str], str]:
    """Return what to fill in besides the study's own page, by the page's name in the docs and its part."""
    parts = {
        ("study-tables.md", "tables"): tables_page(found),
        ("choosing.md", "decision"): markdown(decision_table(found)),
        ("../README.md", "readme"): markdown(decision_table(found, README)),
        ("methods/temperature.md", "temperature"): method_part(found, ["map"]),
    }
    of_page: dict[str, list[str]] = {}
    for method in dict.fromkeys(line["method"] for line in found.by_run.values() if line["method"] != "base"):
        of_page.setdefault(PAGES.get(method, method), []).append(method)
    parts |= {(f"methods/{page}.md", page): method_part(found, methods) for page, methods in of_page.items()}
    for question, differences in answered:
        if question.name == "divergence" and differences:
            parts["methods/divergence.md", question.name] = f"{LEGEND}\n\n{answer(question, differences)}"
    return parts


def main() -> None:
    """Read the lines, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=lines.RESULTS, help="folder of the lines")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the pages")
    parser.add_argument("--study", type=Path, default=STUDY, help="the file that says what is run")
    parser.add_argument(
        "--least-seeds", type=int, default=3, help="seeds under which a row was run before it is told of"
    )
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write the verdicts here, and no page")
    arguments = parser.parse_args()
    cells, seeds = read_study(arguments.study)
    places = {cell.name: place for place, cell in enumerate(cells)}
    every = lines.read(sorted(arguments.results.glob("*.jsonl"), key=lambda file: places.get(file.stem, len(places))))
    found = Lines(enough(every, arguments.least_seeds), arguments.resamples)
    answered = [(question, question.differences(found)) for question in questions(found)]
    if arguments.json:
        content = {q.name: [{"pair": words, **asdict(d)} for words, d in differences] for q, differences in answered}
        arguments.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
        return
    parts = {("study.md", "study"): study_page(found, answered, progress(every, cells, len(seeds)))}
    if found.cells:
        parts |= pages(found, answered)
    texts = {path: path.read_text(encoding="utf-8") for path in (arguments.docs / name for name, _ in parts)}
    for (name, part), content in parts.items():
        texts[arguments.docs / name] = filled(texts[arguments.docs / name], part, content)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    if found.cells:
        figures.write(found, main_cells(found), arguments.docs / "assets")


if __name__ == "__main__":
    main()
