"""Which differences of a comparison's table the test set can tell: the best of each column, and what ties with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from bayeslora.comparison.run import Comparison
from bayeslora.metrics import batched as scoring
from bayeslora.metrics import uncertainty
from bayeslora.metrics.bootstrap import interval, resampled, resampled_two
from bayeslora.metrics.prediction import Prediction

Mark = Literal["best", "tied"]
_SCORES: dict[str, Callable[..., Tensor]] = {
    "accuracy": scoring.accuracy,
    "NLL": scoring.nll,
    "ECE": scoring.ece,
    "Brier": scoring.brier,
    "AURC": scoring.aurc,
}
_UNCERTAINTY: dict[str, Callable[[Prediction], Tensor]] = {
    "AUROC H": lambda p: p.entropy,
    "AUROC MI": lambda p: p.mutual_information,
}


def marked(
    comparison: Comparison, rows: Sequence[dict[str, Any]], labels: Tensor, *, bins: int = 15, resamples: int = 1000
) -> list[dict[str, Any]]:
    """Return a table's rows with ``marks``: by heading, ``best`` or ``tied``.

    A row is tied with the best of a column if the 95 % paired bootstrap interval of their difference holds 0: test rows
    are drawn, the same for both, and scores averaged over the seeds. It says nothing on other seeds or training rows.

    Args:
        comparison: What was found.
        rows: Rows of `bayeslora.comparison.tables.comparison_rows`, of the same comparison.
        labels: Index of the right choice of each test row, [N].
        bins: Bins of the calibration error.
        resamples: Bootstrap resamples.

    Returns:
        Copies of the rows.
    """
    found = [{**row, "marks": dict[str, Mark]()} for row in rows]
    for heading in dict.fromkeys(key for row in rows for key in row):
        there = [row for row in found if isinstance(row.get(heading), list) and len(row[heading])]
        score = _resampled(comparison, heading, labels, bins, resamples)
        if score is None or len(there) < 2:
            continue
        higher = heading == "accuracy" or heading.startswith("AUROC")
        best = (max if higher else min)(there, key=lambda row: sum(row[heading]) / len(row[heading]))
        best["marks"][heading] = "best"
        reference = score(best)
        for row in there:
            if row is not best:
                low, high = interval([a - b for a, b in zip(score(row), reference, strict=True)])
                if not (low > 0 or high < 0):
                    row["marks"][heading] = "tied"
    return found


def _resampled(
    comparison: Comparison, heading: str, labels: Tensor, bins: int, resamples: int
) -> Callable[[dict[str, Any]], list[float]] | None:
    """Return a function from a row to its scores on the resampled test sets; None for columns without one."""
    if heading in _SCORES:
        score = partial(scoring.ece, bins=bins) if heading == "ECE" else _SCORES[heading]
        return lambda row: resampled(
            partial(_over_seeds, score), _stacked(comparison, row), labels, resamples=resamples, batched=True
        )
    kind = next((k for k in _UNCERTAINTY if heading.startswith(k)), None)
    if kind is None:
        return None
    name = heading.removeprefix(kind).strip()
    return lambda row: resampled_two(
        _areas,
        _uncertain(comparison, row, kind, name, False),
        _uncertain(comparison, row, kind, name, True),
        resamples=resamples,
        batched=True,
    )


def _stacked(comparison: Comparison, row: dict[str, Any]) -> Tensor:
    """Return a row's log-probabilities [N K C] under its K seeds."""
    return torch.stack([_log_p(p, row["predictor"]) for p in comparison.predictions[row["method"]].values()], 1)


def _log_p(prediction: Prediction, predictor: str) -> Tensor:
    """Return the log-probabilities [N C] of a predictor."""
    mean = prediction.mean_log_probs
    return prediction.log_p if predictor == "draws" or mean is None else mean


def _uncertain(comparison: Comparison, row: dict[str, Any], kind: str, name: str, outside: bool) -> Tensor:
    """Return a row's uncertainties [N K] on the test rows, or on another data set."""
    method, columns = row["method"], []
    for seed, prediction in comparison.predictions[method].items():
        others = comparison.ood[method][seed]
        p = (others[name] if name in others else next(iter(others.values()))) if outside else prediction
        mean = row["predictor"] == "mean" and p.mean_log_probs is not None
        columns.append(uncertainty.entropy(_log_p(p, "mean")) if mean else _UNCERTAINTY[kind](p))
    return torch.stack([c.double() for c in columns], 1)


def _over_seeds(score: Callable[..., Tensor], log_p: Tensor, labels: Tensor) -> Tensor:
    """Return the scores [R] of log-probabilities [R N K C], averaged over the K seeds."""
    return torch.stack([score(log_p[:, :, k], labels) for k in range(log_p.shape[2])]).mean(0)


def _areas(known: Tensor, unknown: Tensor) -> Tensor:
    """Return the areas [R] under the ROC curves of uncertainties [R N K], averaged over the K seeds."""
    areas = [scoring.auroc(known[..., k].contiguous(), unknown[..., k].contiguous()) for k in range(known.shape[-1])]
    return torch.stack(areas).mean(0)
