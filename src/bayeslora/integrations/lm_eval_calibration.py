"""Calibration of multiple-choice answers, from the samples that the LM evaluation harness logs.

The predicted distribution of an example is the softmax over the scores of its choices as the posterior was trained on
them: over their log-likelihoods, whose most probable choice the harness's ``acc`` counts, or these in relation to the
choices' lengths in characters or to their likelihoods without the question; see `bayeslora.tasks.types.Format`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bayeslora._typing import Float, Int
from bayeslora.errors import InputError
from bayeslora.metrics.classification import brier, ece, nll
from bayeslora.tasks.templates import CHARACTERS_PER_TOKEN

BINS = 15
"""Bins of equal width of the ECE."""
TokenCounter = Callable[[str, str], int]
"""How many tokens a text has after a context: both go in."""
Sample = Mapping[str, Any]
"""A logged sample of the harness: its ``filtered_resps``, ``arguments``, ``target`` and ``filter`` are read."""
Results = dict[str, Any]
"""What `lm_eval.simple_evaluate` returns."""


def choice_log_probs(
    samples: Sequence[Sample], normalisation: str = "sum", tokens: TokenCounter | None = None
) -> tuple[Float[Tensor, "N C"], Int[Tensor, " N"]]:
    """Return log-probabilities, -inf for choices that an example does not have, and the index of each right choice."""
    if not samples:
        raise InputError("there are no logged samples; evaluate with log_samples=True")
    scores = [_scores(number, sample, normalisation, tokens) for number, sample in enumerate(samples)]
    labels = [_label(number, *pair) for number, pair in enumerate(zip(samples, scores, strict=True))]
    rows = [torch.tensor(values, dtype=torch.float64).log_softmax(0) for values in scores]
    return pad_sequence(rows, batch_first=True, padding_value=-torch.inf), torch.tensor(labels)


def calibration(
    samples: Sequence[Sample], bins: int = BINS, normalisation: str = "sum", tokens: TokenCounter | None = None
) -> dict[str, float]:
    """Return the ECE, NLL and Brier score of a multiple-choice task.

    Args:
        samples: The task's logged samples under one filter.
        bins: Bins of equal width of the ECE.
        normalisation: What the log-likelihoods are set in relation to.
        tokens: Counts the tokens of texts, for ``tokens``.

    Returns:
        ``ece``, ``nll`` and ``brier``; see `bayeslora.metrics.classification`.
    """
    log_p, labels = choice_log_probs(samples, normalisation, tokens)
    scores = {"ece": ece(log_p, labels, bins), "nll": nll(log_p, labels), "brier": brier(log_p, labels)}
    return {name: float(score) for name, score in scores.items()}


def add_calibration(
    results: Results, bins: int = BINS, normalisation: str = "sum", tokens: TokenCounter | None = None
) -> Results:
    """Return the harness's results with the calibration of each multiple-choice task, under the harness's kind of keys.

    Args:
        results: What `lm_eval.simple_evaluate` returns, with samples.
        bins: Bins of equal width of the ECE.
        normalisation: What the log-likelihoods are set in relation to: ``sum`` (nothing), ``characters``, ``tokens``,
            or ``unconditional`` for tasks with the harness's ``acc_mutual_info``.
        tokens: Counts the tokens of texts, for ``tokens``.

    Returns:
        The results, where each such task also has ``ece,FILTER``, ``nll,FILTER`` and ``brier,FILTER``. Tasks for which
        they are not defined are named in ``not_calibrated``, with the reason.
    """
    scores = {task: dict(measures) for task, measures in results["results"].items()}
    better = {task: dict(measures) for task, measures in results.get("higher_is_better", {}).items()}
    refused: dict[str, str] = {}
    for task, samples in (results.get("samples") or {}).items():
        if results["configs"][task].get("output_type") != "multiple_choice":
            continue
        for name in dict.fromkeys(sample["filter"] for sample in samples):
            filtered = [sample for sample in samples if sample["filter"] == name]
            try:
                measures = calibration(filtered, bins, normalisation, tokens)
            except InputError as error:
                refused[task] = str(error)
                continue
            scores[task].update({f"{key},{name}": value for key, value in measures.items()})
            better.setdefault(task, {}).update(dict.fromkeys(measures, False))
    return {**results, "results": scores, "higher_is_better": better, "not_calibrated": refused}


def _scores(number: int, sample: Sample, normalisation: str, tokens: TokenCounter | None) -> list[float]:
    """Return the scores of a sample's choices: their log-likelihoods as the normalisation sets them in relation."""
    try:
        scores = [float(response[0]) for response in sample["filtered_resps"]]
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise InputError(f"sample {number} has no log-likelihoods of choices; give a multiple-choice task's") from error
    unconditional: list[float] = []
    if "acc_mutual_info" in sample:  # the second half are the choices without the question
        scores, unconditional = scores[: len(scores) // 2], scores[len(scores) // 2 :]
    if not scores:
        raise InputError(f"sample {number} has no choices")
    match normalisation:
        case "sum":
            return scores
        case "unconditional" if unconditional:
            return [score - less for score, less in zip(scores, unconditional, strict=True)]
        case "characters":
            texts = _texts(sample)[: len(scores)]
            return [score * CHARACTERS_PER_TOKEN / max(1, len(text)) for score, text in zip(scores, texts, strict=True)]
        case "tokens" if tokens is not None:
            pairs = _pairs(sample)[: len(scores)]
            return [score / max(1, tokens(*pair)) for score, pair in zip(scores, pairs, strict=True)]
    raise InputError(f"sample {number} does not tell what normalisation={normalisation!r} needs; use 'characters'")


def _label(number: int, sample: Sample, scores: Sequence[float]) -> int:
    """Return the index of a sample's right choice, which the harness gives as a number or a text."""
    target, texts = sample["target"], _texts(sample)[: len(scores)]
    if isinstance(target, Sequence) and not isinstance(target, str) and len(target) == 1:
        target = target[0]
    label = -1
    if len(set(texts)) == 1 < len(scores):  # the choices are in the contexts, and the target is what follows them all
        if len(scores) == 2 and "acc" in sample:
            best = max(range(2), key=scores.__getitem__)
            label = best if float(sample["acc"]) else 1 - best
    elif isinstance(target, str):
        text = target.strip()
        label = texts.index(text) if text in texts else int(text) if text.isdecimal() else -1
    elif isinstance(target, int):
        label = int(target)
    if not 0 <= label < len(scores):
        raise InputError(f"sample {number} has no single known answer among its {len(scores)} choices")
    return label


def _texts(sample: Sample) -> list[str]:
    """Return the texts of a sample's choices."""
    return [text.strip() for _, text in _pairs(sample)]


def _pairs(sample: Sample) -> list[tuple[str, str]]:
    """Return the contexts and texts of a sample, from the arguments as they are or as they are written to files."""
    arguments = sample["arguments"]
    pairs = [tuple(pair.values()) for pair in arguments.values()] if isinstance(arguments, Mapping) else arguments
    return [(str(pair[0]), str(pair[1])) for pair in pairs]
