"""The table of measures: what each is called, what it needs, and which way is better.

A new measure is a function on batched sets, in `classification` or `detection`, and a row here; `evaluate`, the
comparison's tables and the marks of significance read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from bayeslora.metrics import classification, detection
from bayeslora.metrics.bootstrap import Score


@dataclass(frozen=True)
class Measure:
    """A score of test sets; it needs ``labels`` or true ``probs``, or for ``ood`` the uncertainties of both sets."""

    score: Score
    needs: Literal["labels", "probs", "ood"] = "labels"
    higher_is_better: bool = False


UNCERTAINTIES = {"entropy": "H", "mutual_information": "MI", "likelihood_ratio": "LR", "drift": "drift"}
"""What tells out-of-distribution examples, and how a heading abbreviates it; the last two need the base's answers.

Tuning raises what it has seen above the base, so that both are negated: −(log p − log p_base) of the answer, and its
average over the choices, −KL(p ‖ p_base), are high where the data are foreign.
"""


def measures(bins: int = 15, binning: classification.Binning = "width") -> dict[str, Measure]:
    """Return all measures by name; ``ece_mass`` always has bins of equal mass."""
    return {
        "accuracy": Measure(classification.accuracy, higher_is_better=True),
        "nll": Measure(classification.nll),
        "brier": Measure(classification.brier),
        "ece": Measure(partial(classification.ece, bins=bins, binning=binning)),
        "ece_mass": Measure(partial(classification.ece, bins=bins, binning="mass")),
        "sce": Measure(partial(classification.static_calibration_error, bins=bins, binning=binning)),
        "aurc": Measure(detection.aurc),
        "kl_to_truth": Measure(classification.kl_to_truth, "probs"),
        "auroc": Measure(detection.auroc, "ood", higher_is_better=True),
        "aupr_out": Measure(detection.aupr_out, "ood", higher_is_better=True),
        "aupr_in": Measure(detection.aupr_in, "ood", higher_is_better=True),
        "fpr95": Measure(detection.fpr95, "ood"),
    }
