"""``load_task``: a known task from the Hub or a folder, or the user's own data, as splits ready for a model."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from bayeslora.errors import InputError
from bayeslora.tasks.catalogue import STEMS, KnownTask, SplitName, Stems, find_task, hub_rows, unknown_task
from bayeslora.tasks.columns import Columns, guess_columns, make_columns
from bayeslora.tasks.files import ENDINGS, Rows, find_file, read_rows
from bayeslora.tasks.rows import find_classes, split_from_rows
from bayeslora.tasks.templates import check_normalisation, check_template, default_normalisation
from bayeslora.tasks.types import Example, Format, Normalisation, ReadoutName, Split, Task


@dataclass(frozen=True)
class _Sizes:
    """How many examples go where."""

    few_shot: int  # taken from the training rows into the prompt
    train: int | None
    test: int | None
    validation: int | float  # rows, or share of rows below 1.0, held out of train; rows also of a validation split
    seed: int

    def __post_init__(self) -> None:
        """Refuse numbers without a meaning."""
        if self.few_shot < 0:
            raise InputError(f"few_shot is {self.few_shot}: give 0 or more")
        for name, rows in (("train_rows", self.train), ("test_rows", self.test)):
            if rows is not None and rows < 1:
                raise InputError(f"{name} is {rows}: give 1 or more, or None for all")
        share = isinstance(self.validation, float)
        if self.validation < 0 or (share and self.validation >= 1):
            raise InputError(f"validation is {self.validation}: give a number of rows, or a share below 1.0")

    def held_out(self, rows: int) -> int:
        """Return how many of the training rows are held out."""
        if isinstance(self.validation, float):
            return max(1, round(rows * self.validation)) if self.validation else 0
        return self.validation

    def shuffled(self, rows: int, split: SplitName) -> list[int]:
        """Return the order, by the seed, in which the rows of a split are taken."""
        order = list(range(rows))
        random.Random(f"{self.seed}/{split}").shuffle(order)
        return order


@dataclass(frozen=True)
class _Source:
    """The rows of a task, and how they may be laid out: by none, the user's own data, or by some of these columns."""

    name: str
    known: KnownTask | None
    layouts: tuple[Columns, ...]
    rows: Mapping[SplitName, Rows]


def load_task(
    name: str | None = None,
    data: str | Path | None = None,
    *,
    readout: ReadoutName = "auto",
    template: str | None = None,
    few_shot: int = 0,
    max_length: int | None = None,
    train_rows: int | None = None,
    test_rows: int | None = None,
    validation: int | float = 0.1,
    seed: int = 0,
    columns: Columns | Mapping[str, object] | None = None,
    file_as: Literal["test", "train"] = "test",
    normalisation: Normalisation | None = None,
) -> Task:
    """Load a known task, or one's own data.

    Known are the names in ``KNOWN_TASKS`` and every ``mmlu:<subject>``. Which rows are held out depends on ``seed`` and
    ``validation`` alone, which go into the prompt on ``seed`` and ``few_shot``; a smaller ``train_rows`` or
    ``test_rows`` gives a subset of a larger one.

    Args:
        name: A known task, or a name for one's own data; None takes the name of the file or folder.
        data: Folder that holds the task's folder or files (``train``, ``validation`` or ``dev``, ``test``, ending in
            ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet``), or a single file. None loads from the Hub.
        readout: How answers are read; see ``Format``.
        template: Prompt with ``{text}``, ``{choices}`` for letters, and any other column of the data by its name in
            braces, such as ``{premise}``; None takes the default.
        few_shot: Solved examples in the prompt, taken out of the training rows.
        max_length: Longest prompt in tokens; see ``Format``.
        train_rows: Most rows to train on; None for all.
        test_rows: Most rows to test on; None for all.
        validation: Rows, or share of rows, held out of train; 0 for none. If the source has a validation split, that is
            taken instead, with a number of rows as many of it at most.
        seed: Decides which rows are held out, put into the prompt and kept.
        columns: Where text, label and choices or classes are, as ``Columns`` or some of its fields, such as
            ``{"text": "review", "label": "stars"}``. None: the task's own, or ``text``, ``choices`` and ``label``.
        file_as: What a single file is: the test split, whose labels may be missing, or training rows, of which
            ``validation`` are held out.
        normalisation: What the likelihood of a choice is set in relation to: ``sum`` is its log-likelihood as it is,
            ``characters`` and ``tokens`` take out its length, ``unconditional`` how likely it is without the question;
            see ``Format``. None: ``tokens``, where answers are read by likelihood.

    Returns:
        The task; a split without a source is None.

    Raises:
        InputError: The task is unknown, its data cannot be found or read, or an argument does not fit them.
    """
    sizes = _Sizes(few_shot, train_rows, test_rows, validation, seed)
    fmt = _format(readout, template, max_length, normalisation)
    source = _source(name, data, file_as, described=columns is not None)
    task = _sampled(source.name, _splits(source, columns, fmt), sizes)
    if normalisation not in (None, "sum") and task.normalisation is None:
        raise InputError(
            f"The normalisation {normalisation!r} is for the likelihood readout, which 'auto' does not choose for "
            f"{task.name}: add readout='likelihood'"
        )
    return task


def _format(
    readout: ReadoutName, template: str | None, max_length: int | None, normalisation: Normalisation | None
) -> Format:
    """Return the format without its few-shot examples and kind."""
    if readout not in get_args(ReadoutName):
        raise InputError(f"The readout {readout!r} is unknown: give one of {', '.join(get_args(ReadoutName))}")
    if template is not None and not template:
        raise InputError("The template is empty: give one with {text}, or None for the default")
    if max_length is not None and max_length < 1:
        raise InputError(f"max_length is {max_length}: give a number of tokens, or None for the model's limit")
    check_template(template or "", readout)
    chosen = default_normalisation(readout) if normalisation is None else normalisation
    check_normalisation(chosen, readout)
    return Format(template or "", readout, (), max_length, normalisation=chosen)


def _source(name: str | None, data: str | Path | None, file_as: str, *, described: bool) -> _Source:
    """Read a known task from the Hub, or a file or folder; ``described`` says that the user named columns."""
    if data is None:
        if name is None:
            raise InputError("load_task needs a task or data: give the name of a known task, or data=FOLDER")
        known = find_task(name)
        if known is None:
            raise unknown_task(name)
        return _Source(known.name, known, (known.hub,), {split: hub_rows(known, split) for split in known.splits})
    path = Path(os.path.expanduser(data))
    if not os.path.exists(path):
        raise InputError(f"There is no file or folder {path}: give data=FOLDER with the task's files")
    plain = path.resolve().name if path.is_dir() else path.stem
    known = find_task(name or plain)
    if not path.is_dir():
        if file_as not in {"test", "train"}:
            raise InputError(f"file_as is {file_as!r}: give 'test' or 'train'")
        only: SplitName = "train" if file_as == "train" else "test"
        paths: dict[SplitName, Path] = {only: path}
    else:
        paths = _locate(path, name, known, described=described)
    rows = {split: read_rows(file) for split, file in paths.items()}
    if known is None:
        return _Source(name or plain, None, (), rows)
    return _Source(known.name, known, (known.local, known.hub), rows)


def _locate(data: Path, name: str | None, known: KnownTask | None, *, described: bool) -> dict[SplitName, Path]:
    """Return the file of each split, from the first of the possible folders that holds any."""
    places: list[tuple[Path, Stems]] = [(data, STEMS)]
    if known is not None:
        claimed = {stem for stems in known.stems.values() for stem in stems}
        free = {split: tuple(stem for stem in stems if stem not in claimed) for split, stems in STEMS.items()}
        both = {split: (*known.stems.get(split, ()), *free[split]) for split in STEMS}
        here = both if described or data.name == known.name else known.stems
        places = [(data / known.folder, known.stems), (data / known.name, both), (data, here)]
    elif name is not None:
        places.append((data / name, STEMS))
    for folder, stems in places:
        paths = {split: path for split in stems if (path := find_file(folder, stems[split])) is not None}
        if paths:
            return paths
    folders: dict[str, list[str]] = {}
    for folder, stems in places:
        names = folders.setdefault(", ".join(stem for group in stems.values() for stem in group), [])
        names += [str(folder)] if str(folder) not in names else []
    wanted = " or ".join(f"{stems} in {' or '.join(names)}" for stems, names in folders.items())
    if name is not None and known is None:
        raise unknown_task(name, also=f" (one's own data would be a file {wanted}, ending in {ENDINGS})")
    raise InputError(f"{data} does not hold the data: looked for a file {wanted}, ending in {ENDINGS}")


def _splits(source: _Source, columns: Columns | Mapping[str, object] | None, fmt: Format) -> dict[SplitName, Split]:
    """Return the whole splits; where classes are found in the labels, those of train hold for all."""
    base = source.layouts[0] if source.layouts else Columns()
    described = None if columns is None else make_columns(columns, base)
    by_split = {split: described or _layout(rows, source.layouts) for split, rows in source.rows.items()}
    if source.known is not None:
        fmt = replace(fmt, kind=source.known.kind)
    elif all(layout.choices is None for layout in by_split.values()):
        fmt = replace(fmt, kind="class")
    reference: SplitName = "train" if "train" in source.rows else next(iter(source.rows))
    first = by_split[reference]
    classes = None if first.choices is not None else first.classes or find_classes(source.rows[reference], first.label)
    label_named = isinstance(columns, Mapping) and columns.get("label") is not None
    return {
        split: split_from_rows(
            rows,
            fmt,
            name=f"{source.name}/{split}",
            columns=by_split[split],
            classes=classes,
            need_labels=split != "test" or label_named,
            allow_duplicates=source.known is not None and described is None,
        )
        for split, rows in source.rows.items()
    }


def _layout(rows: Rows, layouts: Sequence[Columns]) -> Columns:
    """Return the first layout whose columns the rows have, the first of all where none fits."""
    if not layouts:
        return guess_columns(rows.columns)
    fitting = [c for label in (True, False) for c in layouts if not c.needed(label=label) - set(rows.columns)]
    return (fitting or layouts)[0]


def _sampled(name: str, splits: dict[SplitName, Split], sizes: _Sizes) -> Task:
    """Hold out the validation rows, take the few-shot examples and keep the rows asked for, in the source's order."""
    train, validation, test = splits.get("train"), splits.get("validation"), splits.get("test")
    shots: tuple[Example, ...] = ()
    if train is None and sizes.few_shot:
        raise InputError(
            f"few_shot={sizes.few_shot} takes examples from the training rows, and {name} has none: use few_shot=0"
        )
    if validation is not None and sizes.validation >= 1:
        validation = validation.take(sorted(sizes.shuffled(len(validation), "validation")[: int(sizes.validation)]))
    if train is not None:
        count = len(train)
        out = 0 if validation is not None else sizes.held_out(count)
        if out + sizes.few_shot >= count:
            raise InputError(
                f"{train.name} has {count} rows, of which {out} for validation and {sizes.few_shot} for the prompt "
                "leave none to train on: ask for fewer"
            )
        order = sizes.shuffled(count, "train")
        if out:
            validation = replace(train.take(sorted(order[:out])), name=f"{name}/validation")
        shots = train.take(order[count - sizes.few_shot :]).examples
        train = train.take(sorted(order[out : count - sizes.few_shot][: sizes.train]))
    if test is not None and sizes.test is not None:
        test = test.take(sorted(sizes.shuffled(len(test), "test")[: sizes.test]))
    with_shots = (
        None if split is None else replace(split, format=replace(split.format, few_shot=shots))
        for split in (train, validation, test)
    )
    return Task(name, *with_shots)
