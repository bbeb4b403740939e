"""One folder of a posterior on disk: a plain PEFT adapter, the spread beside it, and a configuration with checksums.

It knows no family: what is written and read are tensors and scalars by field, and the name of the family.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bayeslora.errors import InputError
from bayeslora.files import read_object
from bayeslora.params import Params, check_finite
from bayeslora.posteriors.provenance import Origin
from bayeslora.version import __version__

FORMAT_VERSION = 1
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
SPREAD = "posterior.safetensors"
CONFIG = "posterior_config.json"


@final
@dataclass(frozen=True)
class Content:
    """What one folder holds: the family's name, the mean, where it comes from, and the family's fields by name.

    ``members`` is how many posteriors it is made of; each has a folder of its own.
    """

    family: str
    mean: Params
    origin: Origin
    tensors: Mapping[str, Params]
    scalars: Mapping[str, object]
    members: int


def write_folder(folder: Path, content: Content) -> None:
    """Write one posterior, without what it is made of."""
    write_adapter(content.mean, content.origin, folder)
    spread = {f"{field}/{name}": v for field, params in content.tensors.items() for name, v in params.items()}
    if spread:
        check_finite(spread, "the posterior cannot be written")
        save_file({key: value.contiguous() for key, value in spread.items()}, folder / SPREAD)
    files = [file for file in (ADAPTER, SPREAD) if (folder / file).exists()]
    config = {
        "format_version": FORMAT_VERSION,
        "bayeslora_version": __version__,
        "family": content.family,
        "scalars": content.scalars,
        "members": content.members,
        **{key: value for key, value in asdict(content.origin).items() if key != "adapter_config"},
        "sha256": {file: _sha256(folder / file) for file in files},
    }
    write_json(folder / CONFIG, config)


def read_folder(folder: Path) -> Content:
    """Read one posterior, without what it is made of; its format and its checksums are checked."""
    config = read_object(folder / CONFIG, f"{folder} is not a posterior of bayeslora (it has no {CONFIG})")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{folder} has format version {version}, and this bayeslora {__version__} reads "
            f"{FORMAT_VERSION}; install the bayeslora that wrote it ({config.get('bayeslora_version')})"
        )
    for key in ("sha256", "fingerprint"):
        if not isinstance(config.get(key), dict):
            raise InputError(f"{folder / CONFIG} has no {key}; copy the folder again")
    for key in ("scalars", "members"):
        if key not in config:
            raise InputError(f"{folder} lacks a part of a {config.get('family')} ({key!r}); copy the folder again")
    for file, digest in config["sha256"].items():
        if not (folder / file).exists():
            raise InputError(f"{folder / file} is missing; copy the whole folder again")
        if _sha256(folder / file) != digest:
            raise InputError(
                f"{folder / file} is damaged or was changed (its checksum is not the one written with "
                "it); copy the folder again"
            )
    adapter = read_object(folder / ADAPTER_CONFIG, f"{folder} has no {ADAPTER_CONFIG}; copy the folder again")
    config = {"normalisation": "sum", **config, "adapter_config": adapter}  # earlier versions had no other
    parts: dict[str, Any] = {field.name: config.get(field.name) for field in fields(Origin)}
    tensors: dict[str, Params] = {}
    for key, value in (read_tensors(folder / SPREAD) if (folder / SPREAD).exists() else {}).items():
        field, _, name = key.partition("/")
        tensors.setdefault(field, {})[name] = value
    mean = read_tensors(folder / ADAPTER)
    return Content(str(config.get("family")), mean, Origin(**parts), tensors, config["scalars"], config["members"])


def write_adapter(params: Params, origin: Origin, folder: Path) -> None:
    """Write a plain PEFT adapter."""
    check_finite(params, "the adapter cannot be written")
    write_json(folder / ADAPTER_CONFIG, origin.adapter_config)
    save_file({k: v.contiguous() for k, v in params.items()}, folder / ADAPTER, metadata={"format": "pt"})


def read_tensors(path: Path) -> Params:
    """Read a safetensors file, in words when it cannot be."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy the folder again") from error


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write JSON for people to read."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    """Return a file's checksum."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
