"""The card of a posterior: its folder's ``README.md``, which extends PEFT's by what makes the adapter a posterior.

The Hub reads the metadata at its head: base model, library, tags and, where there is an evaluation, the scores. PEFT
goes on with the card where it finds one. The text is the template ``card.md``.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from bayeslora.errors import InputError
from bayeslora.files import atomic_file, read_object, write_text
from bayeslora.posteriors.folder import ADAPTER_CONFIG, CONFIG

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from bayeslora.metrics.evaluation import Evaluation

DESCRIPTIONS: dict[str, str] = {}
"""The families in words, by name; each is entered when its class is defined."""
_TEMPLATE = Path(__file__).with_name("card.md")
_NAME = "name = "
"""Begins the line of the card that says where the posterior is loaded from."""
_CLASSES = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation", "multiple-choice"),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification", "text-classification"),
}
"""Class of the base model, the Hub's pipeline, and its name for what is evaluated, by PEFT's type of task."""
_SPLITS = ("train", "validation", "test")


def write_card(
    folder: str | Path, *, evaluation: Evaluation | None = None, task: str = "", name: str | None = None
) -> None:
    """Write the card of a saved posterior anew.

    Args:
        folder: The posterior's folder.
        evaluation: Scores for the card; None for a card without.
        task: What they were measured on, such as ``openbookqa`` or ``openbookqa/test``.
        name: What the card says to load the posterior from; None for the folder's name.

    Raises:
        InputError: If the folder holds no posterior, or cannot be written to.
    """
    path = Path(folder)
    text = card(path, name or path.resolve().name, evaluation, task)
    try:
        with atomic_file(path / "README.md") as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"the card of {path} cannot be written: {error.strerror or error}") from error


def card(path: Path, name: str, evaluation: Evaluation | None = None, task: str = "") -> str:
    """Return the card of a saved posterior, Markdown with metadata at its head; ``name`` is what it is loaded from."""
    import peft
    from huggingface_hub import ModelCard, ModelCardData

    missing = f"{path} is not a posterior of bayeslora (it has no {CONFIG}), so it gets no card"
    config = read_object(path / CONFIG, missing)
    adapter = read_object(path / ADAPTER_CONFIG, f"{path} has no {ADAPTER_CONFIG}; copy the folder again")
    method, base = str(config.get("method") or ""), _on_hub(str(config.get("base_model") or ""))
    auto_class, pipeline, kind = _CLASSES.get(str(adapter.get("task_type")), ("AutoModel", None, "other"))
    data, split = _named(task)
    scores = {} if evaluation is None else evaluation.rows
    head: dict[str, object] = {}
    if evaluation is not None and (results := _results(evaluation, kind, data, split)):
        model_name = " ".join(part for part in (method, base.rpartition("/")[2]) if part)
        head = {"eval_results": results, "model_name": model_name or "posterior"}
    tags = ["bayeslora", "lora", *([method] if method else []), *([f"base_model:adapter:{base}"] if base else [])]
    text = ModelCard.from_template(
        ModelCardData(base_model=base or None, library_name="peft", pipeline_tag=pipeline, tags=tags, **head),
        template_path=_TEMPLATE,
        method=method,
        base=base,
        rows=config.get("num_data"),
        family=DESCRIPTIONS.get(str(config.get("family")), "a posterior").format(members=config.get("members")),
        settings={
            key: json.dumps(value, ensure_ascii=False).replace("|", "\\|")
            for key, value in (config.get("settings") or {}).items()
        },
        auto_class=auto_class,
        name=name,
        files=[file.name for file in path.iterdir()],
        evaluation=evaluation,
        metrics=list(dict.fromkeys(metric for row in scores.values() for metric in row)),
        data=data,
        split=split,
        predictors=[] if evaluation is None else [_predictor(predictor, evaluation) for predictor in scores],
        peft_version=peft.__version__,
        version=config.get("bayeslora_version"),
    )
    return f"{text}\n"


def name_card(folder: Path, name: str) -> None:
    """Put the name of a repository into the card of a saved posterior, where the card has the line for it."""
    path = folder / "README.md"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    named = re.sub(rf'^{_NAME}"[^"\n]*"', lambda _: f'{_NAME}"{name}"', text, count=1, flags=re.MULTILINE)
    if named != text:
        write_text(path, named)


def _on_hub(base: str) -> str:
    """Return the base model's name if it can be one on the Hub; empty for a folder."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(base)
    except HFValidationError:
        return ""
    return "" if Path(base).exists() else base


def _results(evaluation: Evaluation, kind: str, name: str, split: str | None) -> list[EvalResult]:
    """Return the scores as the Hub wants them; those that are not finite, and those of other data, are left out."""
    from huggingface_hub import EvalResult

    from bayeslora.tasks.catalogue import find_task

    known = find_task(name)
    plain = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "own-data"
    only = known.configs[0] if known is not None and len(known.configs) == 1 else None
    results = []
    for predictor, scores in evaluation.rows.items():
        for metric, score in scores.items():
            if "/" in metric or not math.isfinite(score.value):
                continue
            interval = {"low": _short(score.low), "high": _short(score.high)} if math.isfinite(score.low) else {}
            results.append(
                EvalResult(
                    task_type=kind,
                    dataset_type=plain if known is None else known.repository,
                    dataset_name=name,
                    dataset_config=only,
                    dataset_split=split,
                    metric_type=metric,
                    metric_name=f"{metric} of the {_predictor(predictor, evaluation)}",
                    metric_value=_short(score.value),
                    metric_args={"predictor": predictor, **interval},
                )
            )
    return results


def _named(task: str) -> tuple[str, str | None]:
    """Return the task's name and the split's, if it is said; of a file its own name without its folders."""
    if Path(task).is_absolute() or Path(task).is_file():
        return Path(task).name, None
    name, _, split = task.rpartition("/")
    return (name, split) if name and split in _SPLITS else (task or "own data", None)


def _short(value: float) -> float:
    """Return a number with as many digits as anybody reads."""
    return float(f"{value:.6g}")


def _predictor(name: str, evaluation: Evaluation) -> str:
    """Return a predictor in words."""
    return {"draws": f"average over {evaluation.draws} draws", "mean": "posterior mean"}.get(name, name)
