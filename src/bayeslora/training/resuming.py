"""Going on with a run: from its newest complete checkpoint, and with the settings that it was begun with."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from accelerate import PartialState
from transformers import TrainingArguments

from bayeslora.errors import InputError
from bayeslora.methods.checkpoints import checkpoints, incomplete, settings_of
from bayeslora.training.keys import Parts

logger = logging.getLogger(__name__)

DATA = {"train": "training rows", "validation": "validation rows", "tokenizer": "tokenizer", "start": "start"}
"""What is known by a digest alone, in words."""


def checkpoint_of(args: TrainingArguments, settings: Parts | None) -> Path | None:
    """Return a run's newest complete checkpoint, and remove those that are not; refuse those of other settings.

    One of an earlier run in the same folder is passed over where there is one of this run.
    """
    whole: list[tuple[Path, str]] = []
    removed = False
    for path in checkpoints(args.output_dir):
        fault = incomplete(path)
        if not fault:
            whole.append((path, "; ".join(differences(settings_of(path), settings))))
            continue
        logger.warning("%s is not complete and is removed: %s", path, fault)
        if PartialState().is_main_process:
            shutil.rmtree(path, ignore_errors=True)
            removed = True
    own = next((path for path, other in whole if not other), None)
    if own is None and whole:
        path = whole[0][0]
        refuse_others(path, settings_of(path), settings)
    if removed:
        logger.warning("training goes on from %s", own or "the start, for there is no complete checkpoint")
    PartialState().wait_for_everyone()
    return own


def refuse_others(path: Path, before: Mapping[str, object] | None, now: Parts | None) -> None:
    """Refuse settings that are not those with which a file was written."""
    other = "; ".join(differences(before, now))
    if other:
        raise InputError(f"{path} was written with other settings: {other}; resume with those, or begin another folder")


def differences(
    before: Mapping[str, object] | None, now: Mapping[str, object] | None, prefix: str = ""
) -> Iterator[str]:
    """Yield in words how settings differ from those of before, if both are known."""
    if before is None or now is None:
        return
    now = json.loads(json.dumps(now, default=str))
    for name in sorted(before.keys() | now.keys()):
        one, other = before.get(name), now.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from differences(one, other, f"{prefix}{name}.")
        elif one != other:
            yield f"other {DATA[name]}" if name in DATA else f"{prefix}{name} was {one!r} and is {other!r}"
