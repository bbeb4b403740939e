"""One folder of a posterior on disk: a plain PEFT adapter, the spread beside it, and a configuration with checksums.

It knows no family: what is written and read are tensors and scalars by field, and the name of the family.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bayeslora.errors import InputError
from bayeslora.files import parse_json, read_bytes, read_object
from bayeslora.params import Params, check_finite
from bayeslora.posteriors import schema
from bayeslora.posteriors.noise import MERSENNE_TWISTER
from bayeslora.posteriors.provenance import Origin
from bayeslora.version import __version__

FORMAT_VERSION = 3
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
SPREAD = "posterior.safetensors"
CONFIG = "posterior_config.json"
LARGEST = 1e30
"""The largest number in a tensor: sums and products with noise stay finite."""
_DTYPES = ("F32", "F16", "BF16", "F64")
_MOST_TENSORS = 1_000_000
_LONGEST_HEADER = 10**8
"""As long as safetensors takes it."""
_CACHED = "snapshots"
"""The folder of the Hub's cache in which each revision has one, with links to the files in ``blobs`` beside it."""


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
    """Write one posterior; what it is made of is there already, and a checksum of it is written too."""
    write_adapter(content.mean, content.origin, folder)
    spread = {f"{field}/{name}": v for field, params in content.tensors.items() for name, v in params.items()}
    if spread:
        check_finite(spread, "the posterior cannot be written")
        save_file({key: value.contiguous() for key, value in spread.items()}, folder / SPREAD)
    config = {
        "format_version": FORMAT_VERSION,
        "bayeslora_version": __version__,
        "family": content.family,
        "scalars": content.scalars,
        "members": content.members,
        **{key: value for key, value in asdict(content.origin).items() if key != "adapter_config"},
        "sha256": {name: _sha256(folder / name) for name in _covered(folder, content.members)},
    }
    write_json(folder / CONFIG, config | {"checksum": _checksum(config)})


def read_folder(folder: Path) -> Content:
    """Read one posterior, without what it is made of: checksums, then kinds, ranges and values are checked."""
    config = read_object(_file(folder, CONFIG), f"{folder} is not a posterior of bayeslora (it has no {CONFIG})")
    version = config.get("format_version")
    if version not in (1, 2, FORMAT_VERSION) or isinstance(version, bool):
        raise InputError(
            f"{folder} has format version {str(version)[:20]}, and this bayeslora {__version__} reads "
            f"{FORMAT_VERSION}; install the bayeslora that wrote it ({str(config.get('bayeslora_version'))[:20]})"
        )
    for key in ("sha256", "fingerprint"):
        if not isinstance(config.get(key), dict):
            raise InputError(f"{folder / CONFIG} has no {key}; copy the folder again")
    for key in ("family", "scalars", "members"):
        if key not in config:
            raise InputError(
                f"{folder} lacks a part of a {str(config.get('family'))[:60]} ({key!r}); copy the folder again"
            )
    schema.check(folder / CONFIG, config, schema.POSTERIOR)
    schema.check(folder / CONFIG, config["fingerprint"], schema.FINGERPRINT)
    _check_sums(folder, config, version)
    config = {"normalisation": "sum", "noise": MERSENNE_TWISTER, **config}  # earlier versions had no other
    adapter, mean = _adapter(folder, f"{folder} has no {ADAPTER_CONFIG}; copy the folder again", lacking="LORA")
    tensors: dict[str, Params] = {}
    for key, value in (read_tensors(_file(folder, SPREAD)) if (folder / SPREAD).exists() else {}).items():
        field, _, name = key.partition("/")
        tensors.setdefault(field, {})[name] = value
    parts: dict[str, Any] = {field.name: config[field.name] for field in fields(Origin) if field.name in config}
    origin = Origin(**({"base_model": ""} | parts | {"adapter_config": adapter}))
    return Content(config["family"], mean, origin, tensors, config["scalars"], config["members"])


def write_adapter(params: Params, origin: Origin, folder: Path) -> None:
    """Write a plain PEFT adapter."""
    check_finite(params, "the adapter cannot be written")
    write_json(folder / ADAPTER_CONFIG, origin.adapter_config)
    save_file({k: v.contiguous() for k, v in params.items()}, folder / ADAPTER, metadata={"format": "pt"})


def read_adapter(folder: Path) -> tuple[dict[str, Any], Params]:
    """Read a plain PEFT adapter, its configuration and its tensors, checked."""
    missing = f"{folder} is neither a posterior of bayeslora nor a PEFT adapter (it has no {ADAPTER_CONFIG})"
    return _adapter(folder, missing, lacking=None)


def read_tensors(path: Path) -> Params:
    """Read a safetensors file as finite float32; names, types and sizes are looked at before any tensor is made."""
    if not path.is_file():
        raise InputError(f"{path} is missing or no regular file; copy the whole folder again")
    _check_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) > _MOST_TENSORS:
                raise InputError(f"{path} has {len(names):,} tensors, and at most {_MOST_TENSORS:,} are read")
            for name in names:
                part = file.get_slice(name)
                shape = part.get_shape()
                if part.get_dtype() not in _DTYPES or 0 in shape or len(shape) > 8 or len(name) > 4096:
                    kind = f"{part.get_dtype()} {str(shape)[:60]}"
                    raise InputError(f"{path}: {name[:80]!r} is {kind}, and no tensor of floats; copy the folder again")
            tensors = {name: file.get_tensor(name).float() for name in names}
    except InputError:
        raise
    except (OSError, SafetensorError, ValueError, RuntimeError, MemoryError) as error:
        raise InputError(f"{path} cannot be read ({str(error)[:200]}); copy the folder again") from error
    for name, value in tensors.items():
        if not bool((value.abs() <= LARGEST).all()):
            raise InputError(f"{path}: {name[:80]!r} has a value that is not finite or beyond {LARGEST:g}")
    return tensors


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write JSON for people to read."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def member_folder(folder: Path, member: int) -> Path:
    """Return the folder of what a posterior is made of."""
    return folder / f"member-{member}"


def _adapter(folder: Path, missing: str, lacking: str | None) -> tuple[dict[str, Any], Params]:
    """Return an adapter's configuration and tensors, checked; ``lacking`` is its type where it says none."""
    config = read_object(_file(folder, ADAPTER_CONFIG), missing)
    kind = config.get("peft_type", lacking)
    if kind != "LORA":
        raise InputError(f"{folder} is an adapter of type {str(kind)[:60]}; bayeslora serves LoRA adapters only")
    mean = read_tensors(_file(folder, ADAPTER))
    schema.check_adapter(folder / ADAPTER_CONFIG, config, mean)
    return config, mean


def _covered(folder: Path, members: int) -> list[str]:
    """Return the files of which a folder's configuration holds the checksums, by fixed names."""
    spread = [SPREAD] if os.path.lexists(folder / SPREAD) else []
    return [ADAPTER, ADAPTER_CONFIG, *spread, *(f"{member_folder(Path(), k)}/{CONFIG}" for k in range(members))]


def _check_sums(folder: Path, config: Mapping[str, Any], version: int) -> None:
    """Refuse files other than those that were written with the configuration, or another configuration."""
    sums = config["sha256"]
    wanted = _covered(folder, config["members"])
    if version == 1:  # which knew the checksums of the tensors alone
        wanted = [name for name in wanted if name in (ADAPTER, SPREAD)]
    elif _checksum({key: value for key, value in config.items() if key != "checksum"}) != config.get("checksum"):
        raise InputError(
            f"{folder / CONFIG} is damaged or was changed (its checksum is not the one written with it); copy the "
            "folder again"
        )
    for name in sorted({*wanted, *sums}):
        if name not in wanted and name != SPREAD:
            raise InputError(f"{folder / CONFIG} has a checksum of {name[:60]!r}, which is no part of a posterior")
        file = _file(folder, name)
        if not os.path.lexists(file):
            raise InputError(f"{folder / name} is missing; copy the whole folder again")
        if name not in sums:
            raise InputError(f"{folder / CONFIG} has no checksum of {name}; copy the folder again")
        if not file.is_file() or _sha256(file) != sums[name]:  # a pipe is not opened
            raise InputError(
                f"{folder / name} is damaged or was changed (its checksum is not the one written with "
                "it); copy the folder again"
            )


def _file(folder: Path, name: str) -> Path:
    """Return a file of a folder, if it lies there; the links of the Hub's cache lead to its own files."""
    path = folder / name
    if path.is_symlink() or (path.parent.is_symlink() and path.parent != folder):
        try:
            real, root = path.resolve(), folder.resolve()
        except (OSError, RuntimeError) as error:  # a link that leads to itself
            raise InputError(f"{path} is a link that leads nowhere; copy the file itself there") from error
        revision = next((each for each in (root, *root.parents) if each.parent.name == _CACHED), None)
        cache = root if revision is None else revision.parent.parent / "blobs"
        if not (real.is_relative_to(root) or real.is_relative_to(cache)):
            raise InputError(f"{path} is a link to a place outside the folder; copy the file itself there")
    return path


def _checksum(config: Mapping[str, object]) -> str:
    """Return the checksum of a configuration, however it is written."""
    plain = json.loads(json.dumps(config))  # keys are text there, and sorted as such
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    """Return a file's checksum, after a look at its size."""
    if path.suffix == ".json":
        return hashlib.sha256(read_bytes(path)).hexdigest()
    _check_size(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_size(path: Path) -> None:
    """Refuse a safetensors file that is not as long as its header says, or longer than the memory."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= min(size, _LONGEST_HEADER) else b""
    try:
        table = parse_json(text.decode())
        ends = [entry["data_offsets"][1] for key, entry in table.items() if key != "__metadata__"]  # type: ignore[attr-defined]
        whole = max(ends, default=0) == size - 8 - length
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        whole = False
    if not whole:
        raise InputError(f"{path} cannot be read (it is not as long as its header says); copy the folder again")
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise InputError(f"{path} has {size:,} bytes, more than this machine's memory")
