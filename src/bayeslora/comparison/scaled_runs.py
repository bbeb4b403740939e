"""A comparison's posteriors, scaled by divergence; the scale is kept in the comparison's folder."""

from __future__ import annotations

import json
import time
from dataclasses import replace

from bayeslora.comparison.cached_runs import CachedRuns, Learned
from bayeslora.files import write_json
from bayeslora.methods.divergence import NOTE, ScaleByDivergence, scalable
from bayeslora.posteriors import Draws
from bayeslora.posteriors.transforms import tempered
from bayeslora.processes import first
from bayeslora.training import keys

BY_DIVERGENCE = ", scaled by divergence"
"""What follows a method's name in the table."""


def scaled_by_divergence(
    runs: CachedRuns, fitted: Learned, row: str, seed: int, divergence: float
) -> tuple[Learned, float] | None:
    """Return what was learned at the scale with a divergence, by as many draws as answer, and the scale; None for none.

    None is for posteriors that have no noise to scale: points, answers with a temperature, dropout token by token.
    """
    if not scalable(fitted.posterior):
        return None
    method = ScaleByDivergence(divergence, draws=max(1, Draws.of(runs.draws).count))
    depends = {"posterior": fitted.key, "scaled": keys.of_method(method), "seed": seed, **runs.inputs}
    key = keys.key_of(depends)
    file = runs.out / f"seed-{seed}" / f"{row.replace(':', '-').replace(', ', '-').replace(' ', '-')}-{key}.json"
    if not first(file.exists):
        runs.report(f"seed {seed}: {row}: searching the scale")
        began = time.perf_counter()
        found = method.fit(
            runs.model, runs.task, start=fitted.posterior, tokenizer=runs.tokenizer, seed=seed,
            token_budget=runs.token_budget, progress=False,
        )  # fmt: skip
        scale = found.require_origin().settings[NOTE]["scale"]
        record = {"scale": scale, "seconds": time.perf_counter() - began, "depends": depends}
        first(lambda: write_json(file, record))
    record = json.loads(file.read_text(encoding="utf-8"))
    scale, seconds = float(record["scale"]), fitted.cost.train_seconds + float(record["seconds"])
    cost = replace(fitted.cost, train_seconds=seconds)
    return replace(fitted, posterior=tempered(fitted.posterior, scale**2), cost=cost, key=key), scale
