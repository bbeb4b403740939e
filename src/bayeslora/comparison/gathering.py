"""A comparison in parts: each keeps its results in a folder, and the parts make one table, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bayeslora.comparison.cached_runs import CachedRuns
from bayeslora.comparison.costs import Cost
from bayeslora.comparison.run import Comparison, Result, evaluated
from bayeslora.errors import InputError
from bayeslora.files import read_object, write_json
from bayeslora.metrics.prediction import Prediction

RESULTS = "parts.json"
"""The file of a finished part, which lists its results; their predictions are beside it."""


def keep_parts(runs: CachedRuns, comparison: Comparison) -> None:
    """Keep the results of a part in its folder, the list of them last."""
    entries: list[dict[str, object]] = []
    for name, by_seed in comparison.results.items():
        for seed, result in by_seed.items():
            files: dict[str, str] = {}
            for split, prediction in (("", result.prediction), *result.ood.items()):
                files[split] = f"parts/{len(entries)}-{len(files)}.safetensors"
                prediction.save(runs.out / files[split])
            entries.append(
                {"name": name, "seed": seed, "files": files, "cost": asdict(result.cost),
                 "temperature": result.temperature}
            )  # fmt: skip
    write_json(runs.out / RESULTS, {"results": entries})


def gathered(runs: CachedRuns, folders: Sequence[Path]) -> Comparison:
    """Return the comparison that is made of parts, in their order; the model of ``runs`` is not asked for."""
    comparison = Comparison()
    for folder in folders:
        file = folder / RESULTS
        for entry in read_object(file, missing=f"{folder} has no {RESULTS}; finish its job")["results"]:
            predictions = {split: Prediction.load(folder / path) for split, path in entry["files"].items()}
            test = predictions.pop("")
            if test.log_probs.shape[1] != len(runs.test) or predictions.keys() != runs.ood.keys():
                raise InputError(f"{file} is of other data than the plan's; run its job again, in a new folder")
            result: Result = evaluated(runs, test, predictions, Cost(**entry["cost"]), entry["seed"])
            result = replace(result, temperature=entry["temperature"])
            comparison.results.setdefault(entry["name"], {})[entry["seed"]] = result
    return comparison
