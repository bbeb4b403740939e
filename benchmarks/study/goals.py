"""What was hoped of the base as a witness and of scales by divergence, and whether it came true."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from paired import MARGINS, Lines, Row
from questions import DIVERGENCE, SCALED, WITHOUT_LABELS, main_cells, main_row

OVER_CONFIDENT = 0.05
"""Confidence less accuracy on the test rows from which an adapter counts as over-confident."""


def goals_table(lines: Lines) -> list[list[str]]:
    """Return the goals for which there are lines: what was hoped, what was seen, met or missed."""
    found = [*_temperature(lines), *_detection(lines), *_divergence(lines)]
    return [["hoped", "seen", ""], *([hoped, seen, "met" if met else "missed"] for hoped, seen, met in found)]


def _temperature(lines: Lines) -> Iterator[tuple[str, str, bool]]:
    """Yield whether temperatures without labels come near those with labels."""
    margin, seen, near = MARGINS["ece"], [], []
    for cell in main_cells(lines):
        for name in lines.rows(cell):
            rows = [main_row(name + end) for end in (SCALED, WITHOUT_LABELS)]
            if not lines.common(cell, *rows):
                continue
            labelled, unlabelled = (fmean(lines.values(cell, row, "ece")) for row in rows)
            near.append(unlabelled - labelled <= margin)
            if name == "map":
                seen.append(f"{cell}: MAP {unlabelled:.3f} without labels, {labelled:.3f} with")
    if near:
        seen.append(f"within {margin:g} in {sum(near)} of {len(near)} rows of a cell")
        hoped = f"a temperature without labels has an ECE within {margin:g} of one with labels"
        yield hoped, "; ".join(seen), all(near)


def _detection(lines: Lines) -> Iterator[tuple[str, str, bool]]:
    """Yield whether MAP's likelihood ratio detects foreign data better than its entropy."""
    entropy, ratio = Row("map", "mean"), Row("map", "mean", "likelihood ratio")
    seen, better = [], []
    for cell in main_cells(lines):
        if not lines.common(cell, entropy, ratio):
            continue
        for foreign in lines.foreign(cell):
            by_ratio, by_entropy = (fmean(lines.values(cell, row, f"auroc {foreign}")) for row in (ratio, entropy))
            better.append(by_ratio > by_entropy)
            seen.append(f"{cell} / {foreign}: {by_ratio:.3f} against {by_entropy:.3f}")
    if better:
        hoped = "MAP's likelihood ratio detects foreign data better than its entropy on half of the pairs"
        yield hoped, f"on {sum(better)} of {len(better)}; AUROC, {'; '.join(seen)}", 2 * sum(better) >= len(better)


def _divergence(lines: Lines) -> Iterator[tuple[str, str, bool]]:
    """Yield whether TFB scaled by divergence is better than by its own rule on every over-confident adapter."""
    own, scaled, mapped = Row("tfb", "draws"), Row("tfb" + DIVERGENCE, "draws"), Row("map", "mean")
    seen, better = [], []
    for cell in main_cells(lines):
        adapters = [
            seed
            for seed in lines.common(cell, own, scaled, mapped)
            if lines.over_confidence(cell, mapped, seed) > OVER_CONFIDENT
        ]
        if adapters:
            nll = [tuple(float(lines.scores(cell, row, seed, "nll")[0]) for row in (scaled, own)) for seed in adapters]
            here = [by_divergence < by_rule for by_divergence, by_rule in nll]
            better += here
            means = [fmean(values) for values in zip(*nll, strict=True)]
            seen.append(f"{cell}: {sum(here)} of {len(here)}, NLL {means[0]:.3f} against {means[1]:.3f}")
    if better:
        hoped = "TFB scaled by divergence has a lower NLL than by its own rule on every over-confident adapter"
        yield hoped, f"on {sum(better)} of {len(better)}; {'; '.join(seen)}", all(better)
