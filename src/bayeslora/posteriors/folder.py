"""One folder of a posterior on disk: tensors, JSON and checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bayeslora.errors import InputError
from bayeslora.params import Params
from bayeslora.posteriors.provenance import Origin

if TYPE_CHECKING:
    pass


FORMAT_VERSION = 1
_ADAPTER, _SPREAD, _CONFIG = "adapter_model.safetensors", "posterior.safetensors", "posterior_config.json"


def _write_adapter(params: Params, origin: Origin, folder: Path) -> None:
    """Write a plain PEFT adapter."""
    _write_json(folder / "adapter_config.json", origin.adapter_config)
    save_file({k: v.contiguous() for k, v in params.items()}, folder / _ADAPTER, metadata={"format": "pt"})


def _read_tensors(path: Path) -> Params:
    """Read a safetensors file, in words when it cannot be."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy the folder again") from error


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON for people to read."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    """Return a file's checksum."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
