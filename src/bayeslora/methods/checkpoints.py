"""Checkpoints: what methods write into them before they count as complete, and which of them are complete.

The Trainer writes ``trainer_state.json`` last, and deletes older checkpoints after it. Just before, it asks callbacks
that are an `ExportableState` what to keep there: that is when methods write what they have learned beside the adapter.
"""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from bayeslora.errors import InputError
from bayeslora.methods.callback import Run
from bayeslora.methods.records import records

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"
"""The file of a checkpoint that is written last."""


@final
class CheckpointState(TrainerCallback, ExportableState):
    """Lets methods write into each checkpoint before it is complete, and lists the checkpoint's files.

    ``settings`` are kept with them: what a run depends on, ready for JSON.
    """

    def __init__(self, settings: Mapping[str, object] | None = None) -> None:
        self.settings = settings
        self.run: Run | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: Any) -> None:
        """Note the run, and refuse a checkpoint that has lost some of its files."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        fault = _lost(folder, _attributes(state.stateful_callbacks)) if folder.is_dir() else ""
        if fault:
            raise InputError(
                f"{folder} is not complete: {fault}; pass resume_from_checkpoint=bayeslora.last_checkpoint"
                f"({args.output_dir!r})"
            )
        state.stateful_callbacks.setdefault(type(self).__name__, {})  # not in checkpoints of earlier versions
        self.run = Run.of(args, state, kwargs)

    def on_train_end(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Forget the run."""
        self.run = None

    def state(self) -> dict[str, Any]:
        """Write what methods have learned, and return the list of files: the Trainer is about to write ``STATE``."""
        attributes: dict[str, Any] = {}
        if self.run is not None:
            run = self.run
            folder = Path(run.args.output_dir) / f"checkpoint-{run.state.global_step}"
            for record in records(run.model):
                if record.save is not None:
                    record.save(folder, run)
            # other processes write the states of their random numbers meanwhile
            files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith("rng_state_")]
            for path in files:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            sizes = {path.name: path.stat().st_size for path in files if path.name != STATE}
            attributes = {"files": sizes, "seed": run.args.seed}
        return {"args": {"settings": self.settings}, "attributes": attributes}


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the newest complete checkpoint of a Trainer, for its ``resume_from_checkpoint``.

    A run that was killed while it wrote or deleted a checkpoint leaves one that is not complete. The Trainer's own
    ``resume_from_checkpoint=True`` takes the newest without a look.

    Args:
        folder: The Trainer's ``output_dir``.

    Returns:
        The checkpoint's folder; None if there is none. What is passed over is logged as a warning.
    """
    for path in checkpoints(folder):
        fault = incomplete(path)
        if not fault:
            return str(path)
        logger.warning("%s is not complete and is passed over: %s", path, fault)
    return None


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def incomplete(checkpoint: Path) -> str:
    """Return what keeps a run from going on from a checkpoint exactly, in words; nothing if it is complete."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if state["global_step"] != int(checkpoint.name[11:]):
            return f"{STATE} is of step {state['global_step']}"
        lost = _lost(checkpoint, _attributes(state.get("stateful_callbacks")))
        inside = list(_inside(checkpoint))
    except FileNotFoundError:
        return f"{STATE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{STATE} cannot be read"
    for kinds in (
        ("adapter_model",),
        ("optimizer", "global_step", "pytorch_model_fsdp"),
        ("scheduler",),
        ("rng_state",),
    ):
        if not any(path.name.startswith(kinds) for path in inside):
            lost = lost or f"{kinds[0]} is missing"
    return lost or next((f"{path.name} is cut" for path in inside if not _readable(path)), "")


def settings_of(checkpoint: Path) -> dict[str, Any] | None:
    """Return the settings of the run that wrote a complete checkpoint; None if it does not say."""
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return _stored(state.get("stateful_callbacks")).get("args", {}).get("settings")


def seed_of_checkpoint(state: TrainerState) -> int | None:
    """Return the seed of the run that wrote the checkpoint from which a Trainer goes on; None if it does not say."""
    return _attributes(state.stateful_callbacks).get("seed")


def _stored(callbacks: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what `CheckpointState` kept in ``STATE``."""
    stored = (callbacks or {}).get(CheckpointState.__name__) or {}
    return stored[-1] if isinstance(stored, list) else stored


def _attributes(callbacks: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the attributes that `CheckpointState` kept in ``STATE``."""
    return _stored(callbacks).get("attributes", {})


def _lost(folder: Path, attributes: Mapping[str, Any]) -> str:
    """Return which file of a checkpoint is missing or has another size, in words."""
    for name, size in attributes.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes in the place of {size}"
    return ""


def _inside(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder and in the folders of its adapters."""
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir():
            yield from sorted(path.glob("adapter_model*"))


def _readable(path: Path) -> bool:
    """Return whether a file of a kind that is known is whole."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                file.keys()
        elif path.suffix in (".pt", ".pth", ".bin") and path.name != "training_args.bin":
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
    except (OSError, SafetensorError, zipfile.BadZipFile):
        return False
    return True
