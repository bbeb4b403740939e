"""From the study's file to what can be run: cells, their methods, and the runs that they share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import logging as transformers_logging

import bayeslora as bl
from bayeslora.cli.build import build_arguments
from bayeslora.cli.data import build_task, other_splits
from bayeslora.cli.demo.model import demo_encoder, demo_model
from bayeslora.cli.options import TaskOptions, TrainingOptions
from bayeslora.cli.settings import build_method
from bayeslora.comparison.cached_runs import CachedRuns
from bayeslora.errors import InputError
from bayeslora.methods import Ensemble, Inference, Swag
from bayeslora.methods.divergence import DIVERGENCE
from bayeslora.params import lora_parameters
from bayeslora.tasks.types import Split

STUDY = Path(__file__).parent / "study.yaml"
BASE = "base"
"""The row of the model before any training; it is no method."""
_DEMO = {"encoder": demo_encoder, "causal": demo_model}


@dataclass(frozen=True)
class Entry:
    """A method of a cell: how it is learned, and which rows follow from its posterior."""

    name: str
    method: Inference | None  # None for `BASE`
    draws: bl.Draws
    scaled: float  # nats a row, to show it scaled by divergence too; 0: not
    controls: tuple[str, ...]  # isotropic noise around its mean: of the ``same`` variance, or ``matched`` in cost


@dataclass(frozen=True)
class Cell:
    """A model on a task with its methods; ``config`` is what the study's file says of all else."""

    name: str
    config: dict[str, Any]
    entries: tuple[Entry, ...]

    @property
    def causal(self) -> bool:
        """Whether the model answers without a new head, so that there is a base to compare with."""
        return self.config.get("readout", "auto") != "auto"


def read_study(path: Path = STUDY) -> tuple[list[Cell], list[int]]:
    """Return the cells of a study's file, and its seeds."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    cells = []
    for name, config in content["cells"].items():
        wanted = config.get("only") or list(content["methods"])
        entries = (_entry(method, content["methods"][method], config) for method in wanted)
        plain = {key: value for key, value in config.items() if key not in ("only", "methods")}
        cell = Cell(name, plain, ())
        cells.append(replace(cell, entries=tuple(e for e in entries if e.method is not None or cell.causal)))
    return cells, content["seeds"]


def _entry(name: str, content: dict[str, Any], config: dict[str, Any]) -> Entry:
    """Return one method as the cell has it, else as all cells have it."""
    content = config.get("methods", {}).get(name, content)
    word = content.get("method", name)
    settings = content.get("settings", ())
    draws = dict(config["draws"])
    draws["count"] = content.get("draws", draws["count"])
    return Entry(
        name,
        None if name == BASE else build_method(word, settings),
        bl.Draws(**draws),
        config.get("divergence", DIVERGENCE) if content.get("scaled") else 0.0,
        tuple(content.get("controls", ())),
    )


def prepared(cell: Cell, seed: int, data: str, out: Path, model: str = "") -> CachedRuns:
    """Return what all methods of a cell share under a seed, which also decides which rows are taken."""
    transformers_logging.set_verbosity_error()
    config = cell.config
    options = TaskOptions(
        task=config["task"], data=data, readout=config.get("readout", "auto"), validation=config["validation"],
        train_rows=config["train_rows"], test_rows=config["test_rows"], task_seed=seed,
    )  # fmt: skip
    task = build_task(options)
    if task.test is None or task.train is None:
        raise InputError(f"{config['task']} has no training or no test rows in {data}; see the README of the data")
    others = other_splits(config["foreign"], options, task.test, config["foreign_rows"])
    name = model or config.get("name") or str(_DEMO[config["model"]]())
    dtype = getattr(torch, config.get("dtype", "float32"))
    peft, tokenizer = bl.load_model(name, task.test.classes, dtype=dtype, **config["model_options"])
    training = TrainingOptions(**config["training"])
    folder = out / cell.name
    args = build_arguments(training, folder, 0)
    args.disable_tqdm, args.dataloader_pin_memory = True, False
    return CachedRuns(
        peft, tokenizer, task, args, folder, others, token_budget=config.get("token_budget"), resamples=0,
        report=lambda words: print(f"  {cell.name}: {words}", flush=True),
    )  # fmt: skip


def validation_of(runs: CachedRuns) -> Split:
    """Return the rows that every choice is made on."""
    assert runs.task.validation is not None
    return runs.task.validation


def checked(cell: Cell) -> str:
    """Return what a cell takes, in words, from its model without weights: that its recipe fits together."""
    shape = dict(cell.config["shape"])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    dtype = getattr(torch, cell.config.get("dtype", "float32"))
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        options = {name: value for name, value in cell.config["model_options"].items() if name != "dropout"}
        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **options))
    steps = planned_steps(cell)
    adapter = sum(p.numel() for p in lora_parameters(model).values())
    weights = sum(p.numel() * p.element_size() for p in base.parameters())
    runs = sum(passes(entry.method) for entry in cell.entries)
    return (
        f"{cell.name}: {weights / 1e9:.1f} GB of weights, {adapter:,} adapter parameters, {len(cell.entries)} methods, "
        f"{runs:g} runs of {steps:,} steps a seed"
    )


def planned_steps(cell: Cell) -> int:
    """Return the optimiser steps of one run of a cell."""
    training = TrainingOptions(**cell.config["training"])
    steps = cell.config["train_rows"] / training.batch_size * training.epochs
    return training.max_steps or round(steps)


def passes(method: Inference | None) -> float:
    """Return the cost of training in runs of MAP: SWAG goes on from one for half as long; what is fitted needs one."""
    if method is None:
        return 0.0
    members = method.members if isinstance(method, Ensemble) else 1
    inner = method.member if isinstance(method, Ensemble) else method
    return members * (1.5 if isinstance(inner, Swag) else 1.0)
