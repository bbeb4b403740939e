"""The table of measures: what each is called, what it needs, and which way is better.

A new measure is a function on batched sets, in `classification` or `detection`, and a row here; `evaluate`, the
comparison's tables and the marks of significance read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from bayeslora.metrics.bootstrap import Score
from bayeslora.metrics.classification import (
    Binning,
    accuracy,
    brier,
    ece,
    kl_to_truth,
    nll,
    static_calibration_error,
)
from bayeslora.metrics.detection import aupr_in, aupr_out, aurc, auroc, fpr95


@dataclass(frozen=True)
class Measure:
    """A score of test sets.

    ``needs``: ``labels`` or true ``probs`` beside the predictions, or for ``ood`` the uncertainties of both sets.
    """

    score: Score
    needs: Literal["labels", "probs", "ood"] = "labels"
    higher_is_better: bool = False


UNCERTAINTIES = {"entropy": "H", "mutual_information": "MI"}
"""What tells out-of-distribution examples, and how a heading abbreviates it."""


def measures(bins: int = 15, binning: Binning = "width") -> dict[str, Measure]:
    """Return all measures by name; ``ece_mass`` always has bins of equal mass."""
    return {
        "accuracy": Measure(accuracy, higher_is_better=True),
        "nll": Measure(nll),
        "brier": Measure(brier),
        "ece": Measure(partial(ece, bins=bins, binning=binning)),
        "ece_mass": Measure(partial(ece, bins=bins, binning="mass")),
        "sce": Measure(partial(static_calibration_error, bins=bins, binning=binning)),
        "aurc": Measure(aurc),
        "kl_to_truth": Measure(kl_to_truth, "probs"),
        "auroc": Measure(auroc, "ood", higher_is_better=True),
        "aupr_out": Measure(aupr_out, "ood", higher_is_better=True),
        "aupr_in": Measure(aupr_in, "ood", higher_is_better=True),
        "fpr95": Measure(fpr95, "ood"),
    }
