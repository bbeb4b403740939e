"""Detection by a score of one's own, such as the likelihood ratio of prompts, beside what `evaluate` tells sets by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from bayeslora._typing import Float
from bayeslora.metrics.evaluation import Evaluation, estimates
from bayeslora.metrics.measures import measures


def with_score(
    evaluation: Evaluation,
    kind: str,
    known: Float[Tensor, " N"],
    unknown: Mapping[str, Float[Tensor, " M"]],
    *,
    seed: int = 0,
) -> Evaluation:
    """Return an evaluation with ``SET/auroc_KIND`` and the other detection scores of each set.

    Args:
        evaluation: Of the same examples; the scores go to its ``mean``, or the draws where there is no mean.
        kind: What the score is called.
        known: The score of its examples, high where they are foreign.
        unknown: That of the examples of each out-of-distribution set.
        seed: Seed of the resampling.

    Returns:
        The evaluation with as many resamples behind the new intervals.
    """
    table = {name: measure for name, measure in measures().items() if measure.needs == "ood"}
    found = {
        f"{name}/{score}_{kind}": estimate
        for name, scores in unknown.items()
        for score, estimate in estimates(table, [[known], [scores]], evaluation.resamples, seed).items()
    }
    predictor = "mean" if "mean" in evaluation.rows else "draws"
    rows = {name: {**of, **(found if name == predictor else {})} for name, of in evaluation.rows.items()}
    return replace(evaluation, rows=rows)
