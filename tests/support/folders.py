"""Posterior folders that are changed and sealed again, so that what is behind the checksums is reached."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

CONFIG, ADAPTER_CONFIG = "posterior_config.json", "adapter_config.json"
TENSORS = ("adapter_model.safetensors", "posterior.safetensors")


def change(path: Path, **values: Any) -> None:
    """Change values of a JSON file, or take them out, and leave the checksums as they are."""
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def seal(folder: Path) -> None:
    """Write the checksums anew, as far as the files are there and are files."""
    members = sorted(path for path in folder.glob("member-*") if path.is_dir() and not path.is_symlink())
    for member in members:
        seal(member)
    path = folder / CONFIG
    if not _small(path):
        return
    try:
        config = json.loads(path.read_text())
        names = [*TENSORS, ADAPTER_CONFIG, *(f"{member.name}/{CONFIG}" for member in members)]
        sums = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names if _small(folder / n)}
        if isinstance(config.get("sha256"), dict):
            config["sha256"] |= sums
        config.pop("checksum", None)
        config["checksum"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(config))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return


def second_format(folder: Path) -> None:
    """Make a folder what format version 2 was: it did not say what draws are made from."""
    for member in folder.glob("member-*"):
        second_format(member)
    change(folder / CONFIG, format_version=2, noise=None)
    seal(folder)


def first_format(folder: Path) -> None:
    """Make a folder what format version 1 was: checksums of the tensors alone."""
    for member in folder.glob("member-*"):
        first_format(member)
    config = json.loads((folder / CONFIG).read_text())
    config["sha256"] = {name: value for name, value in config["sha256"].items() if name in TENSORS}
    del config["checksum"]
    config.pop("noise", None)
    (folder / CONFIG).write_text(json.dumps(config | {"format_version": 1}, indent=2, sort_keys=True) + "\n")


def _small(path: Path) -> bool:
    """Whether a path is a file of a size that is read at once."""
    return path.is_file() and path.stat().st_size < 2**24
