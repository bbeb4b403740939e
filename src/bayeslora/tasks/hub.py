"""Rows of a known task from the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bayeslora.errors import InputError
from bayeslora.tasks.catalogue import KnownTask, SplitName
from bayeslora.tasks.files import Rows

# Branch on which the Hub keeps a parquet copy of repositories that have a loading script only.
_CONVERTED = "refs/convert/parquet"


def hub_rows(task: KnownTask, split: SplitName) -> Rows:
    """Load one split of a known task from the Hub, its configurations one after the other."""
    import datasets

    rows: list[Mapping[str, object]] = []
    for config in task.configs:
        try:
            rows.extend(dict(row) for row in _load(task.repository, config, task.splits[split]))
        except ConnectionError:
            raise InputError(
                f"The Hub could not be reached to load {task.name} ({task.repository}): give data=FOLDER with a local "
                "copy"
            ) from None
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise InputError(
                f"The Hub's {task.repository} could not be loaded for {task.name} ({first}): give data=FOLDER with a "
                "local copy"
            ) from None
    return Rows(f"{task.repository} {task.splits[split]}", tuple(rows))


def _load(repository: str, config: str | None, split: str) -> Iterable[Mapping[str, object]]:
    """Return the rows of one configuration; where there is only a loading script, those of the Hub's parquet copy."""
    import datasets

    try:
        return datasets.load_dataset(repository, config, split=split)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        return datasets.load_dataset(repository, config, split=split, revision=_CONVERTED)
