"""The card of a posterior: its folder's ``README.md``, which extends PEFT's by what makes the adapter a posterior.

The Hub reads the metadata at its head: base model, library, tags and, where there is an evaluation, the scores. PEFT
goes on with the card where it finds one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.errors import InputError
from bayeslora.files import atomic_file, read_object

if TYPE_CHECKING:
    from bayeslora.metrics.evaluation import Estimate, Evaluation

_NAME = "name = "
"""Begins the line of the card that says where the posterior is loaded from."""
DESCRIPTIONS: dict[str, str] = {}
"""The families in words, by name; each is entered when its class is defined."""
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
    """Return the card of a saved posterior.

    Args:
        path: The posterior's folder.
        name: What the card says to load the posterior from.
        evaluation: Scores for the card; None for a card without.
        task: What they were measured on.

    Returns:
        Markdown with the metadata at its head.

    Raises:
        InputError: If the folder holds no posterior.
    """
    config = read_object(
        path / "posterior_config.json",
        f"{path} is not a posterior of bayeslora (it has no posterior_config.json), so it gets no card",
    )
    adapter = read_object(path / "adapter_config.json", f"{path} has no adapter_config.json; copy the folder again")
    base = _on_hub(str(config.get("base_model") or ""))
    head = _metadata(config, adapter, base, evaluation, task)
    parts = [_about(config, base), _settings(config), _use(adapter, base, name), _files(path)]
    if evaluation is not None:
        parts.append(_numbers(evaluation, task))
    body = "\n\n".join(part for part in [*parts, _versions(config)] if part)
    return f"---\n{head}\n---\n\n{body}\n"


def name_card(folder: Path, name: str) -> None:
    """Put the name of a repository into the card of a saved posterior, where the card has the line for it.

    Args:
        folder: The posterior's folder.
        name: Name of the repository.
    """
    path = folder / "README.md"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    named = re.sub(rf'^{_NAME}"[^"\n]*"', lambda _: f'{_NAME}"{name}"', text, count=1, flags=re.MULTILINE)
    if named != text:
        with atomic_file(path) as partial:
            partial.write_text(named, encoding="utf-8")


def _on_hub(base: str) -> str:
    """Return the base model's name if it can be one on the Hub; empty for a folder."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(base)
    except HFValidationError:
        return ""
    return "" if Path(base).exists() else base


def _metadata(
    config: Mapping[str, Any], adapter: Mapping[str, Any], base: str, evaluation: Evaluation | None, task: str
) -> str:
    """Return the card's head as YAML."""
    from huggingface_hub import ModelCardData

    _, pipeline, kind = _CLASSES.get(str(adapter.get("task_type")), (None, None, "other"))
    method = str(config.get("method") or "")
    tags = ["bayeslora", "lora", *([method] if method else []), *([f"base_model:adapter:{base}"] if base else [])]
    scores: dict[str, Any] = {} if evaluation is None else {"eval_results": _results(evaluation, kind, task)}
    if scores.get("eval_results"):
        scores["model_name"] = " ".join(part for part in (method, base.rpartition("/")[2]) if part) or "posterior"
    data = ModelCardData(base_model=base or None, library_name="peft", pipeline_tag=pipeline, tags=tags, **scores)
    text: str = data.to_yaml()
    return text


def _results(evaluation: Evaluation, kind: str, task: str) -> list[Any]:
    """Return the scores as the Hub wants them; those that are not finite, and those of other data, are left out."""
    from huggingface_hub import EvalResult

    from bayeslora.tasks.catalogue import find_task

    name, split = _named(task)
    known = find_task(name)
    plain = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "own-data"
    only = known.configs[0] if known is not None and len(known.configs) == 1 else None
    found = []
    for predictor, scores in evaluation.rows.items():
        for metric, score in scores.items():
            if "/" in metric or not math.isfinite(score.value):
                continue
            interval = {"low": _short(score.low), "high": _short(score.high)} if math.isfinite(score.low) else {}
            found.append(
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
    return found


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


def _about(config: Mapping[str, Any], base: str) -> str:
    """Return the card's title and what the posterior is."""
    method, rows = str(config.get("method") or "an unnamed method"), config.get("num_data")
    of = f" of [{base}](https://huggingface.co/{base})" if base else ""
    family = DESCRIPTIONS.get(str(config.get("family")), "a posterior").format(members=config.get("members"))
    number = f" from {rows:,} training examples" if isinstance(rows, int) else ""
    return (
        f"# A posterior over a LoRA adapter: {method}\n\n"
        f"A distribution over a LoRA adapter{of}, learned by `{method}` with bayeslora{number}: {family}. The "
        "average of its draws' probabilities says how sure an answer is, and what the draws disagree about is what the "
        "training data do not settle. To tools that know nothing of it this is a plain PEFT adapter, the mean."
    )


def _settings(config: Mapping[str, Any]) -> str:
    """Return the method's settings as a table; empty if there are none."""
    settings = config.get("settings") or {}
    if not settings:
        return ""
    cells = [(key, json.dumps(value, ensure_ascii=False).replace("|", "\\|")) for key, value in settings.items()]
    rows = "\n".join(f"| `{key}` | `{value}` |" for key, value in cells)
    return f"| setting of {config.get('method') or 'the method'} | value |\n|---|---|\n{rows}"


def _use(adapter: Mapping[str, Any], base: str, name: str) -> str:
    """Return how the posterior is loaded, with bayeslora and without, and how its draws are exported."""
    kind = _CLASSES.get(str(adapter.get("task_type")), ("AutoModel", "", ""))[0]
    labels = ", num_labels=..." if kind.endswith("SequenceClassification") else ""
    model = f'"{base}"' if base else '"..."'
    return f"""## Use

```python
import bayeslora as bl
from peft import PeftModel
from transformers import {kind}

{_NAME}"{name}"  # this repository, or its folder
base = {kind}.from_pretrained({model}{labels})
model = PeftModel.from_pretrained(base, name)  # without bayeslora: the posterior's mean
posterior = bl.load_posterior(name, model)
prediction = bl.predict(model, posterior, split, draws=10)  # a bl.load_task(...).test, or your own
prediction.probs, prediction.mutual_information
```

Draws as plain PEFT adapters, for any server; average the probabilities of their answers:

```python
bl.export_draws(posterior, "adapters", 10)  # adapters/draw-000 …
```"""


def _files(folder: Path) -> str:
    """Return what the folder's files are."""
    words = {
        "adapter_config.json": "PEFT's configuration of the adapter",
        "adapter_model.safetensors": "the posterior's mean, a plain PEFT adapter",
        "posterior_config.json": "family, method, settings, base model and checksums",
        "posterior.safetensors": "the spread",
    }
    rows = [f"| `{file}` | {said} |" for file, said in words.items() if (folder / file).exists()]
    if (folder / "member-0").is_dir():
        rows.append("| `member-0` … | what it is made of, each such a folder |")
    return "\n".join(["## Files", "", "| file | what it holds |", "|---|---|", *rows])


def _numbers(evaluation: Evaluation, task: str) -> str:
    """Return the scores as a table, with their intervals."""
    name, split = _named(task)
    metrics = list(dict.fromkeys(metric for scores in evaluation.rows.values() for metric in scores))
    head: Sequence[str] = ["", *(_predictor(predictor, evaluation) for predictor in evaluation.rows)]
    rows = [[metric, *(_cell(scores.get(metric)) for scores in evaluation.rows.values())] for metric in metrics]
    table = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
    sets = "".join(f", against {count} of {other}" for other, count in evaluation.ood.items())
    intervals = f", with 95 % bootstrap intervals ({evaluation.resamples} resamples)" if evaluation.resamples else ""
    return (
        f"## Evaluation\n\n{evaluation.n} examples of {name}{f' ({split})' if split else ''}{sets}{intervals}. Lower "
        f"is better but for accuracy, AUROC and AUPR.\n\n{table}"
    )


def _cell(score: Estimate | None) -> str:
    """Return a score and its interval."""
    if score is None:
        return ""
    interval = "" if math.isnan(score.low) else f" [{score.low:.4f}, {score.high:.4f}]"
    return f"{score.value:.4f}{interval}"


def _versions(config: Mapping[str, Any]) -> str:
    """Return the versions, under the heading that PEFT looks for."""
    import peft

    return f"### Framework versions\n\n- PEFT {peft.__version__}\n- bayeslora {config.get('bayeslora_version')}"
