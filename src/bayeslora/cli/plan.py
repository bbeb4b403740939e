"""A comparison as jobs for a scheduler: one for each method and seed, and the table of them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from bayeslora.cli.runs import recorded
from bayeslora.errors import InputError
from bayeslora.files import read_object, write_json, write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")

_FILE = "plan.json"


def write_plan(folder: Path, options: DataclassInstance, methods: Mapping[str, str], seeds: list[int]) -> list[Path]:
    """Write the options of each job, ``jobs/0.yaml`` and so on, and of the whole; return the jobs' files."""
    # a job keeps its results in ``runs/<number>``, and goes on with what is there
    import yaml

    from bayeslora.tasks import find_task

    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is there already; choose another folder for --plan")
    others = [Path(name) for name in getattr(options, "ood", ())]
    paths = [path.exists() and (find_task(str(path)) is None or len(path.parts) > 1) for path in others]
    whole = {k: v for k, v in recorded(options).items() if k not in ("plan", "gather", "resume", "keep_parts")}
    whole["ood"] = [str(path.resolve() if is_path else path) for path, is_path in zip(others, paths, strict=True)]
    jobs: list[dict[str, object]] = []
    for label, typed in methods.items():
        settings = [item for item in map(str, getattr(options, "set", ())) if item.startswith(f"{_owner(label)}.")]
        for seed in seeds:
            out = str((folder / "runs" / str(len(jobs))).resolve())
            own = {"methods": [typed], "seeds": [seed], "set": settings, "out": out, "resume": True, "keep_parts": True}
            jobs.append(own)
    files = []
    for number, own in enumerate(jobs):
        files.append(folder / "jobs" / f"{number}.yaml")
        write_text(files[-1], yaml.safe_dump(whole | own, sort_keys=False, allow_unicode=True))
    write_json(folder / _FILE, {"options": whole, "jobs": jobs})
    return files


def _owner(label: str) -> str:
    """Return what ``--set`` calls a method by its label."""
    return label.partition(":")[0]


def read_plan(folder: Path, kind: type[Options]) -> tuple[Options, list[Path]]:
    """Return the options of a plan's comparison, and the folders of its jobs; refuse if one of them is not done."""
    from bayeslora.comparison.gathering import RESULTS

    plan = read_object(folder / _FILE, missing=f"{folder} holds no plan; write one with bayeslora compare … --plan")
    hints = {f.name for f in fields(kind)}
    folders = [folder / "runs" / str(number) for number in range(len(plan["jobs"]))]
    missing = [number for number, each in enumerate(folders) if not (each / RESULTS).exists()]
    if missing:
        job = plan["jobs"][missing[0]]
        raise InputError(
            f"{len(missing)} of {len(folders)} jobs are not done, the first of them {missing[0]} "
            f"({job['methods'][0]}, seed {job['seeds'][0]}); run bayeslora compare --config "
            f"{folder / 'jobs' / str(missing[0])}.yaml"
        )
    return kind(**{k: v for k, v in plan["options"].items() if k in hints}), folders
