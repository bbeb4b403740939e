"""Differences between rows of the study: paired bootstrap over seeds and test rows, Holm's correction, a margin.

A score of a row in a cell is its mean over the seeds; over several cells, the mean of the cells' scores. A resample
draws seeds with replacement, and test rows with replacement within each, the same for both rows that are compared. The
p-value is that of a normal distribution with the resamples' standard deviation. Holm (1979) corrects the p-values of
all comparisons of one question. A difference is the ``same`` if its 95 % interval lies within the stated margin, else
``better`` or ``worse`` if its corrected p-value is below .05, else ``open``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from lines import unpacked
from torch import Tensor

from bayeslora.metrics.bootstrap import interval
from bayeslora.metrics.classification import accuracy, brier, ece, nll
from bayeslora.metrics.detection import auroc
from bayeslora.metrics.uncertainty import drift, entropy, likelihood_ratio

MARGINS = {"accuracy": 0.01, "nll": 0.02, "ece": 0.02, "brier": 0.01, "auroc": 0.02}
"""Differences within these do not matter to us: nats for NLL, shares for the others."""
SCORES: dict[str, Callable[..., Tensor]] = {"accuracy": accuracy, "nll": nll, "ece": ece, "brier": brier}
HIGHER = ("accuracy", "auroc")
"""Scores of which more is better."""
AGAINST_BASE = ("likelihood ratio", "drift", "prompt ratio")
"""Kinds of doubt that need the base's answers."""
Verdict = Literal["better", "worse", "same", "open"]


class Row(NamedTuple):
    """A row's name, its predictor (``mean``, ``draws``, or the first N of them: ``N draws``), and how it doubts."""

    name: str
    predictor: str
    kind: str = "entropy"  # what tells foreign data: of an "auroc"

    @property
    def counted(self) -> str:
        """The number of draws of a predictor ``N draws``; else nothing."""
        return self.predictor.removesuffix("draws").strip() if self.predictor.endswith(" draws") else ""


@dataclass(frozen=True)
class Difference:
    """The score of a row less that of another: its value, 95 % interval, p-value as corrected, and verdict."""

    first: Row
    second: Row
    score: str
    cells: tuple[str, ...]
    value: float
    low: float
    high: float
    p: float
    verdict: Verdict = "open"


class Lines:
    """The lines of the study by cell, row and seed, and scores resampled from them."""

    def __init__(self, found: Sequence[Mapping[str, Any]], resamples: int = 1000) -> None:
        self.resamples = resamples
        self.by_run: dict[tuple[str, str, int], Mapping[str, Any]] = {
            (line["cell"], line["row"], line["seed"]): line for line in found
        }
        self.cells = tuple(dict.fromkeys(line["cell"] for line in found))
        self.scores = lru_cache(maxsize=None)(self._scores)

    def rows(self, cell: str) -> list[str]:
        """Return the rows of a cell, in the order of their lines."""
        return list(dict.fromkeys(row for of, row, _ in self.by_run if of == cell))

    def names(self) -> list[str]:
        """Return the rows of all cells, in the order of their lines."""
        return list(dict.fromkeys(row for _, row, _ in self.by_run))

    def train_rows(self, cell: str) -> int:
        """Return a cell's number of training rows."""
        return next(int(line["config"]["train_rows"]) for (of, _, _), line in self.by_run.items() if of == cell)

    def seeds(self, cell: str, row: str) -> list[int]:
        """Return the seeds under which a cell has a row."""
        return sorted(seed for of, name, seed in self.by_run if (of, name) == (cell, row))

    def common(self, cell: str, *rows: Row) -> tuple[int, ...]:
        """Return the seeds under which a cell has all of some rows, with what each needs."""
        return tuple(sorted(set.intersection(*(set(self._told(cell, row)) for row in rows))))

    def _told(self, cell: str, row: Row) -> Iterator[int]:
        """Yield the seeds under which a cell has a row, and the base or the number of draws that it needs."""
        for seed in self.seeds(cell, row.name):
            if row.kind in AGAINST_BASE and (cell, "base", seed) not in self.by_run:
                continue
            if not row.counted or row.counted in self.by_run[cell, row.name, seed]["by draws"]:
                yield seed

    def foreign(self, cell: str) -> list[str]:
        """Return the names of a cell's foreign sets."""
        return next(list(line["config"]["foreign"]) for (of, _, _), line in self.by_run.items() if of == cell)

    def over_confidence(self, cell: str, row: Row, seed: int) -> float:
        """Return the confidence of a row on the test rows less its accuracy."""
        log_p, labels = self.answers(cell, row, seed)
        return float(log_p.amax(-1).exp().mean() - accuracy(log_p, labels))

    def answers(self, cell: str, row: Row, seed: int) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of the test rows under one seed, and their labels."""
        content = self.by_run[cell, row.name, seed]["rows"]
        return unpacked(content[row.predictor]["test"]), torch.tensor(content["labels"])

    def values(self, cell: str, row: Row, score: str) -> list[float]:
        """Return a score of a row under each seed; ``auroc`` for detection, ``auroc FOREIGN`` of one set."""
        return [float(self._on(cell, row, seed, score, None)) for seed in self.common(cell, row)]

    def by_draws(self, cell: str, name: str, score: str) -> dict[int, float]:
        """Return a score of the first N draws by every N that all seeds have, averaged; nothing of a single N."""
        runs = [self.by_run[cell, name, seed]["by draws"] for seed in self.seeds(cell, name)]
        counts = sorted(set.intersection(*(set(map(int, run)) for run in runs))) if runs else []
        return {count: fmean(run[str(count)][score] for run in runs) for count in counts if len(counts) > 1}

    def _scores(self, cell: str, row: Row, seed: int, score: str) -> Tensor:
        """Return a score of a row under one seed, as it is and on each resampled test set, [1 + R].

        Lines hold no rows of the first N draws, so that their scores are not resampled.
        """
        if row.counted:
            said = self.by_run[cell, row.name, seed]["by draws"][row.counted][score]
            return torch.full((1 + self.resamples,), said, dtype=torch.float64)
        whole = self._on(cell, row, seed, score, None)
        sets = self._on(cell, row, seed, score, torch.Generator().manual_seed(seed))
        return torch.cat([whole.view(1), sets])

    def _on(self, cell: str, row: Row, seed: int, score: str, draw: torch.Generator | None) -> Tensor:
        """Return a score on the test rows, or on resampled ones."""

        def taken(values: Tensor) -> Tensor:
            """Return some numbers, or resampled sets of them, by the next random numbers."""
            if draw is None:
                return values
            return values[torch.randint(len(values), (self.resamples, len(values)), generator=draw)]

        if not score.startswith("auroc"):
            log_p, labels = self.answers(cell, row, seed)
            if draw is None:
                return SCORES[score](log_p, labels)
            index = torch.randint(len(labels), (self.resamples, len(labels)), generator=draw)
            return SCORES[score](log_p[index], labels[index])
        if score == "auroc":
            every = [self._on(cell, row, seed, f"auroc {name}", draw) for name in self.foreign(cell)]
            return torch.stack(every).mean(0)
        known, unknown = (self.doubt(cell, row, seed, split) for split in ("test", score.removeprefix("auroc ")))
        return auroc(taken(known), taken(unknown))

    def doubt(self, cell: str, row: Row, seed: int, split: str) -> Tensor:
        """Return how foreign each row of a split looks by a kind of uncertainty; more is more foreign."""
        content = self.by_run[cell, row.name, seed]["rows"]
        if row.kind in ("mutual information", "prompt ratio"):
            values = unpacked(content[row.kind][split])
            return values if row.kind == "mutual information" else -values
        log_p = unpacked(content[row.predictor][split])
        if row.kind == "entropy":
            return entropy(log_p)
        base = unpacked(self.by_run[cell, "base", seed]["rows"]["mean"][split])
        if row.kind == "drift":
            return -drift(log_p, base)
        return -likelihood_ratio(log_p, base)

    def compared(self, first: Row, second: Row, score: str, cells: Sequence[str]) -> Difference:
        """Return a difference over cells, its p-value not yet corrected."""
        parts = []
        for cell in cells:
            seeds = self.common(cell, first, second)
            one, other = (torch.stack([self.scores(cell, row, s, score) for s in seeds]) for row in (first, second))
            apart = one - other  # [seeds, 1 + R]
            generator = torch.Generator().manual_seed(len(seeds))
            chosen = torch.randint(len(seeds), (len(seeds), self.resamples), generator=generator)
            parts.append(torch.cat([apart[:, :1].mean(0), apart[:, 1:].gather(0, chosen).mean(0)]))
        whole = torch.stack(parts).mean(0)
        value, resampled = float(whole[0]), whole[1:]
        low, high = map(float, interval(resampled))
        error = float(resampled.std())
        p = math.erfc(abs(value) / error / math.sqrt(2)) if error else float(value == 0)
        return Difference(first, second, score, tuple(cells), value, low, high, p)


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """Return the differences of one question with Holm's p-values, and their verdicts."""
    order = sorted(range(len(differences)), key=lambda i: differences[i].p)
    adjusted, largest = dict[int, float](), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * differences[i].p))
        adjusted[i] = largest
    return [replace(d, p=adjusted[i], verdict=_verdict(d, adjusted[i])) for i, d in enumerate(differences)]


def _verdict(difference: Difference, p: float) -> Verdict:
    """Return what a difference says."""
    name = difference.score.split(" ")[0]
    margin = MARGINS[name]
    if -margin <= difference.low and difference.high <= margin:
        return "same"
    if p < 0.05:
        return "better" if (difference.value > 0) == (name in HIGHER) else "worse"
    return "open"
