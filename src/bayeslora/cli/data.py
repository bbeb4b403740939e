"""From the command line's options to tasks and splits, and what a run keeps so that it can answer without its data."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from torch import Tensor

from bayeslora._typing import Float
from bayeslora.cli.launch import once
from bayeslora.cli.options import TaskOptions
from bayeslora.errors import InputError, listed
from bayeslora.files import read_object, write_json
from bayeslora.metrics.prediction import Prediction
from bayeslora.posteriors import Posterior
from bayeslora.posteriors.provenance import Origin
from bayeslora.tasks import Columns, Rows, find_task, load_task, read_rows, split_from_rows
from bayeslora.tasks.columns import guess_columns, make_columns
from bayeslora.tasks.files import find_file
from bayeslora.tasks.templates import default_normalisation, template_columns
from bayeslora.tasks.types import Example, Format, Normalisation, Split, Task, TaskKind

_FILE = "task.json"


def build_task(options: TaskOptions, file_as: Literal["train", "test"] = "test") -> Task:
    """Return the task that the options describe; ``file_as`` says what a single file is."""
    if not options.task and not options.data:
        raise InputError("name a task (--task openbookqa) or give your own data (--data FILE --text-column …)")
    return load_task(
        options.task or None,
        options.data or None,
        readout=options.readout,
        template=unescaped(options.template) or None,
        few_shot=options.few_shot,
        max_length=options.max_length or None,
        train_rows=options.train_rows or None,
        test_rows=options.test_rows or None,
        validation=int(options.validation) if options.validation >= 1 else options.validation,
        seed=options.task_seed,
        columns=named_columns(options) or None,
        file_as=file_as,
        normalisation=None if options.normalisation == "auto" else options.normalisation,
    )


def scored_as(options: TaskOptions, origin: Origin | None) -> TaskOptions:
    """Return options with the normalisation of a posterior, where they name none."""
    known = None if origin is None else origin.normalisation
    if known is None or options.normalisation != "auto":
        return options
    return replace(options, normalisation=cast(Normalisation, known))


def unescaped(template: str) -> str:
    r"""Return a template as it was meant where it was typed: ``\n`` is a new line, ``\\n`` these two signs."""
    return re.sub(r"\\(\\n|n)", lambda found: "\n" if found[1] == "n" else "\\n", template)


def named_columns(options: TaskOptions) -> dict[str, object]:
    """Return the columns that the options name, as `load_task` takes them."""
    choices = tuple(options.choice_columns)
    columns: dict[str, object] = {
        "text": options.text_column,
        "label": options.label_column,
        "choices": choices if len(choices) > 1 else "".join(choices),
        "classes": tuple(options.classes),
    }
    return {key: value for key, value in columns.items() if value}


def other_splits(names: Sequence[str], options: TaskOptions, like: Split, rows: int = 0) -> dict[str, Split]:
    """Return the test splits of other known tasks or paths by short names, put to the model as the first task's is.

    ``./trec`` is a folder even where ``trec`` is a known task. A path's short name is its last part, with its folder
    where that is not enough. ``rows`` is the most of each; 0: as many as of the first task.
    """
    short = [Path(name).stem for name in names]
    clear = [Path(name).stem if short.count(Path(name).stem) == 1 else f"{Path(name).parent.name}-{Path(name).stem}"
             for name in names]  # fmt: skip
    return {key: _other(name, options, like, rows) for key, name in zip(clear, names, strict=True)}


def _other(name: str, options: TaskOptions, like: Split, rows: int) -> Split:
    """Return the test split of one other data set."""
    path, limit = Path(name), rows or options.test_rows or None
    is_path = path.exists() and (find_task(name) is None or os.sep in name)  # a run's folder may be called trec too
    if is_path and like.classes is not None:
        file = path if path.is_file() else find_file(path, ("test",))
        if file is None:
            raise InputError(f"{name} has no test examples")
        table = read_rows(file)
        text = options.text_column or guess_columns(table.columns).text
        split = split_from_rows(table, like.format, name=name, columns=Columns(text, None), classes=like.classes)
        return split.take(range(len(split))[:limit])
    folder = options.data if find_task(options.task) and Path(options.data).is_dir() else ""
    template = like.format.template if template_columns(like.format.template) else None  # so that its columns are read
    other = load_task(
        None if is_path else name,
        path if is_path else folder or None,
        template=template,
        test_rows=limit,
        seed=options.task_seed,
        columns=named_columns(options) or None if is_path else None,
    )
    if other.test is None:
        raise InputError(f"{name} has no test examples")
    if like.classes is None:
        return replace(other.test, format=replace(like.format, kind=other.test.format.kind))
    # a classifier answers every text with its own classes; what is asked is only whether it is unsure
    examples = tuple(replace(e, choices=like.classes, label=None, probs=None) for e in other.test)
    return replace(other.test, examples=examples, classes=like.classes, format=like.format)


def save_run(out: Path, posterior: Posterior, rows: Split | None) -> None:
    """Keep a posterior in its run's folder, and how its rows are put to the model: a run answers without them."""

    def save() -> None:
        """Write both."""
        if rows is not None:
            write_json(out / _FILE, {"name": rows.name, "classes": rows.classes, "format": asdict(rows.format)})
        posterior.save_pretrained(out / "posterior")

    once(save)


def format_from_options(options: TaskOptions, name: str, origin: Origin | None) -> Split:
    """Return how the options alone put examples to the model, as a split without examples."""
    kind: TaskKind = "class" if options.classes else "question"
    named = scored_as(options, origin).normalisation
    normalisation = default_normalisation(options.readout) if named == "auto" else named
    form = Format(unescaped(options.template), options.readout, (), options.max_length or None, kind, normalisation)
    return Split(name, (), form, tuple(options.classes) or None)


def saved_format(folder: Path, options: TaskOptions) -> Split | None:
    """Return how a run puts examples to the model, as a split without any; None if its folder does not say."""
    if not (folder / _FILE).exists():
        return None
    saved = read_object(folder / _FILE, missing="")
    try:
        form, classes, name = saved["format"], saved["classes"], saved["name"]
        kind, normalisation = form["kind"], form.get("normalisation", "sum")
        shots = tuple(map(_solved, form["few_shot"]))
        known = kind in get_args(TaskKind) and normalisation in get_args(Normalisation) and isinstance(name, str)
        if not known or not (classes is None or _texts(classes)):
            raise TypeError("a value is none that this version knows")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / _FILE} cannot be used ({str(error)[:80]}); copy the run again") from error
    if options.normalisation not in ("auto", normalisation):
        raise InputError(
            f"the run was trained with --normalisation {normalisation}, not {options.normalisation}; leave it out"
        )
    if options.few_shot > len(shots):
        raise InputError(f"the run keeps {len(shots)} solved examples, and --few-shot asks for {options.few_shot}")
    template, longest = unescaped(options.template), options.max_length or None
    form = Format(template, options.readout, shots[: options.few_shot], longest, kind, normalisation)
    return Split(name, (), form, tuple(classes) if classes else None)


def _solved(saved: Mapping[str, Any]) -> Example:
    """Return a solved example that a run keeps; refuse one that is none by a TypeError."""
    columns = tuple((key, value) for key, value in saved.get("columns", ()))
    example = Example(saved["text"], tuple(saved["choices"]), saved["label"], columns=columns)
    texts = _texts([example.text, *example.choices, *(text for pair in columns for text in pair)])
    if not texts or example.label not in range(len(example.choices)):
        raise TypeError("a solved example is none")
    return example


def _texts(values: object) -> bool:
    """Return whether a value is a list of texts."""
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def split_like(rows: Rows, like: Split, options: TaskOptions) -> Split:
    """Return rows as examples without labels, with the format and the classes of another split."""
    if not len(rows):
        raise InputError(f"{rows.name} has no rows to answer")
    known = find_task(options.task) or find_task(Path(options.data).stem)
    layouts = [
        Columns(layout.text, None, layout.choices if like.classes is None else None, context=layout.context)
        for layout in [*((known.hub, known.local) if known is not None else ()), guess_columns(rows.columns)]
    ]
    answerable = [c for c in layouts if like.classes is not None or c.choices is not None]
    columns = next((c for c in answerable if c.needed() <= set(rows.columns)), layouts[-1])
    named = named_columns(options)
    columns = make_columns({key: named[key] for key in ("text", "choices") if key in named}, columns)
    if like.classes is not None:
        columns = replace(columns, choices=None)
    elif columns.choices is None:
        raise InputError(
            f"{rows.name} has no column of choices (its columns are {listed(rows.columns)}); name it with "
            "--choice-columns"
        )
    return split_from_rows(rows, like.format, name=rows.name, columns=columns, classes=like.classes)


def split_as_trained(rows: Rows, options: TaskOptions, folder: Path, origin: Origin | None) -> Split:
    """Return rows as examples of the task that the run in a folder was trained on."""
    like, tasks = saved_format(folder, options), scored_as(options, origin)
    if like is None and not tasks.task and not tasks.data and (tasks.classes or "choices" in rows.columns):
        like = format_from_options(tasks, rows.name, origin)
    return split_like(rows, _example_split(build_task(tasks)) if like is None else like, tasks)


def rows_to_learn(task: Task, options: TaskOptions, file: str) -> Split:
    """Return the rows to distil from: those of a file, else the validation rows, else the training rows."""
    if file:
        return split_like(read_rows(file), replace(_example_split(task), name=file), options)
    rows = task.validation or task.train
    if not rows:
        raise InputError("there are no rows to learn from; give --input FILE")
    return rows


def _example_split(task: Task) -> Split:
    """Return a split of a task, to take the format from."""
    split = task.test if task.train is None else task.train
    if split is None:
        raise InputError(f"the task {task.name} has no examples to take the format from")
    return split


def answered(rows: Rows, split: Split, prediction: Prediction) -> list[dict[str, object]]:
    """Return each row with its answer and its uncertainty; a field that the row has already is ``predicted_``…."""
    columns = {key for row in rows for key in row}
    names = ("confidence", "entropy", "mutual_information", "disagreement", "monte_carlo_error")
    scores = {name: value for name in names if (value := getattr(prediction, name)) is not None}
    said = {"probs": prediction.probs}
    if prediction.base_log_probs is not None:
        scores |= {"drift": prediction.drift, "likelihood_ratio": prediction.likelihood_ratio}
        said["base_probs"] = prediction.base_log_probs.exp()
    counts, answers = prediction.draws_taken.tolist(), prediction.answer
    answered_rows = []
    for i, (row, example) in enumerate(zip(rows, split, strict=True)):
        new = {
            "answer": example.choices[int(answers[i])],
            **{name: round(float(values[i]), 6) for name, values in scores.items()},
            "draws": counts[i],
            **{name: _by_choice(example, probs[i]) for name, probs in said.items()},
        }
        answered_rows.append({**row, **{f"predicted_{k}" if k in columns else k: v for k, v in new.items()}})
    return answered_rows


def _by_choice(example: Example, probs: Float[Tensor, " C"]) -> dict[str, float]:
    """Return the probabilities of an example's choices."""
    return {choice: round(float(p), 6) for choice, p in zip(example.choices, probs, strict=False)}


def test_of(options: TaskOptions, folder: Path, *, inherited: bool) -> Split:
    """Return the test split of a run's task, or of other data unless ``inherited``, put to the model as in training."""
    if inherited and Path(options.data).is_file():
        raise InputError(f"the run was trained on all of {options.data}; give test rows with --data FILE")
    like = saved_format(folder, options)
    task = build_task(replace(options, few_shot=0) if like is not None else options)
    if task.test is None:
        raise InputError(f"the task {task.name} has no test examples; give some with --data FILE")
    if like is None:
        return task.test
    shots = replace(task.test.format, few_shot=like.format.few_shot, normalisation=like.format.normalisation)
    return _aligned(replace(task.test, format=shots), like.classes)


def _aligned(split: Split, classes: tuple[str, ...] | None) -> Split:
    """Return the split with the labels counted in the classes that were trained on."""
    if classes is None or split.classes is None or split.classes == classes:
        return split
    examples = []
    for row, e in enumerate(split):
        answer = None if e.label is None else e.choices[e.label]
        if answer is not None and answer not in classes:
            raise InputError(
                f"row {row} of {split.name} has the class {answer[:80]!r}, and the run was trained on {listed(classes)}"
            )
        examples.append(replace(e, choices=classes, label=None if answer is None else classes.index(answer)))
    return replace(split, examples=tuple(examples), classes=classes)
