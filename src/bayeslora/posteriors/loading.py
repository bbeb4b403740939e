"""Posteriors on disk: a plain PEFT adapter and, beside it, what makes it a posterior.

``adapter_config.json`` and ``adapter_model.safetensors`` are the mean, for every tool that reads PEFT adapters.
``posterior_config.json`` holds family, method, base model and checksums, ``posterior.safetensors`` the spread,
``README.md`` is the card. Members of a mixture, and the posterior that another is made of, are sub-folders. A folder
appears at once, when all of it is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import save_file
from torch import Tensor, nn

from bayeslora.errors import InputError
from bayeslora.files import atomic_folder, read_object
from bayeslora.params import Params, check_against, lora_parameters
from bayeslora.posteriors import (
    ColumnDropout,
    DiagonalGaussian,
    Draws,
    KroneckerGaussian,
    Linearised,
    LowRankGaussian,
    Mixture,
    Point,
    Posterior,
    Scaled,
    TokenDropout,
)
from bayeslora.posteriors.card import card
from bayeslora.posteriors.folder import (
    _ADAPTER,
    _CONFIG,
    _SPREAD,
    FORMAT_VERSION,
    _read_tensors,
    _sha256,
    _write_adapter,
    _write_json,
)
from bayeslora.posteriors.hub import fetch
from bayeslora.posteriors.provenance import Origin, check_base
from bayeslora.posteriors.sampling import former_keywords
from bayeslora.posteriors.transforms import draw_count
from bayeslora.version import __version__

if TYPE_CHECKING:
    from bayeslora.metrics.evaluation import Evaluation

FAMILIES: dict[str, Callable[..., Posterior]] = {
    family.__name__: family
    for family in (
        Point,
        DiagonalGaussian,
        LowRankGaussian,
        KroneckerGaussian,
        ColumnDropout,
        TokenDropout,
        Mixture,
        Linearised,
        Scaled,
    )
}


def save_posterior(
    posterior: Posterior,
    folder: Path,
    *,
    overwrite: bool = False,
    evaluation: Evaluation | None = None,
    task: str = "",
) -> None:
    """Write a posterior to a folder; see the module for its layout.

    Args:
        posterior: Any posterior with an origin.
        folder: Where to.
        overwrite: Whether a folder that is there may be replaced.
        evaluation: Scores for the card.
        task: What they were measured on.
    """
    with atomic_folder(folder, overwrite=overwrite) as work:
        _write_posterior(posterior, work)
        text = card(work, folder.resolve().name, evaluation, task)
        (work / "README.md").write_text(text, encoding="utf-8")


def load_posterior(
    name: str | Path,
    model: nn.Module | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Posterior:
    """Read a posterior from a folder or from the Hugging Face Hub.

    Args:
        name: Folder, or repository ``org/name``.
        model: PEFT model that it is for; if given, its base and its adapter's names and shapes are checked now rather
            than when the posterior is used.
        revision: Branch, tag or commit on the Hub.
        token: Token for a private repository; None for the one that the machine is logged in with.

    Returns:
        The posterior, checked: format version, checksums, and every tensor's name and shape.

    Raises:
        InputError: If it is no posterior, one of another format, a file is damaged, or it is not for the model; the
            message says which.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = fetch(str(name), revision, token)
    posterior = _read_posterior(folder)
    if model is not None:
        check_base(_origin(posterior), model)
        check_against(posterior.mean, lora_parameters(model))
    return posterior


def load_adapter(name: str | Path, *, revision: str | None = None) -> Posterior:
    """Read a posterior, or a plain PEFT adapter as a point.

    Args:
        name: Folder, or repository ``org/name``.
        revision: Branch, tag or commit on the Hub.

    Returns:
        The posterior. The origin of a plain adapter has no fingerprint of its base, which only the one who trained it
        could have taken: it is for `bayeslora.params.write`, not for `bayeslora.predict`.

    Raises:
        InputError: If it is neither.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = fetch(str(name), revision)
    if (folder / _CONFIG).exists():
        return load_posterior(folder)
    missing = f"{folder} is neither a posterior of bayeslora nor a PEFT adapter (it has no adapter_config.json)"
    config = read_object(folder / "adapter_config.json", missing)
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{folder} is an adapter of type {config.get('peft_type')}; bayeslora serves LoRA adapters only"
        )
    origin = Origin(config, str(config.get("base_model_name_or_path") or ""), {})
    return Point(_read_tensors(folder / _ADAPTER), origin)


@former_keywords("draws", Draws, seed="seed", sampling="sampling")
def export_draws(
    posterior: Posterior,
    folder: str | Path,
    draws: int | Draws,
    *,
    name: str = "draw",
) -> list[Path]:
    """Write draws as plain PEFT adapters, for any tool that reads them.

    Args:
        posterior: Any posterior with an origin.
        folder: Where to; it gets a sub-folder ``draw-000`` … for each draw.
        draws: How many, or `Draws`; rounded up to whole groups of the sampling.
        name: What stands in the place of ``draw``, so that one server can hold adapters of several exports.

    Returns:
        The adapters' folders.

    Raises:
        InputError: If the name is no name of a folder and an adapter, or the folder cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"the adapters' name {name!r} must be of letters, digits, '.', '_' and '-'")
    target, draws = Path(folder), Draws.of(draws)
    names = [f"{name}-{k:03d}" for k in range(draw_count(posterior, draws.count, draws.sampling))]
    with atomic_folder(target) as work:
        for k, own in enumerate(names):
            (work / own).mkdir()
            _write_adapter(posterior.draw(k, draws.seed, draws.sampling), _origin(posterior), work / own)
    return [target / own for own in names]


def _write_posterior(posterior: Posterior, folder: Path) -> None:
    """Write one posterior, and a mixture's members below it."""
    origin = _origin(posterior)
    _write_adapter(posterior.mean, origin, folder)
    tensors: Params = {}
    scalars: dict[str, Any] = {}
    for f in fields(cast(Any, posterior)):
        value = getattr(posterior, f.name)
        if f.name in ("mean", "origin", "members", "posterior"):
            continue
        if isinstance(value, Mapping) and all(isinstance(v, Tensor) for v in value.values()):
            tensors |= {f"{f.name}/{name}": v.contiguous() for name, v in value.items()}
        else:
            scalars[f.name] = dict(value) if isinstance(value, Mapping) else value
    if tensors:
        save_file(tensors, folder / _SPREAD)
    members: tuple[Posterior, ...] = ()
    if isinstance(posterior, Mixture):
        members = posterior.members
    elif isinstance(posterior, Linearised | Scaled):
        members = (posterior.posterior,)
    for i, member in enumerate(members):
        (folder / f"member-{i}").mkdir()
        _write_posterior(member, folder / f"member-{i}")
    files = [f for f in (_ADAPTER, _SPREAD) if (folder / f).exists()]
    config = {
        "format_version": FORMAT_VERSION,
        "bayeslora_version": __version__,
        "family": type(posterior).__name__,
        "scalars": scalars,
        "members": len(members),
        **{k: v for k, v in asdict(origin).items() if k != "adapter_config"},
        "sha256": {f: _sha256(folder / f) for f in files},
    }
    _write_json(folder / _CONFIG, config)


def _read_posterior(folder: Path) -> Posterior:
    """Read one posterior, and a mixture's members below it."""
    config = read_object(folder / _CONFIG, f"{folder} is not a posterior of bayeslora (it has no {_CONFIG})")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{folder} has format version {version}, and this bayeslora {__version__} reads "
            f"{FORMAT_VERSION}; install the bayeslora that wrote it ({config.get('bayeslora_version')})"
        )
    family = FAMILIES.get(str(config.get("family")))
    if family is None:
        raise InputError(f"{folder / _CONFIG} names the family {config.get('family')!r}; known: {', '.join(FAMILIES)}")
    for key in ("sha256", "fingerprint"):
        if not isinstance(config.get(key), dict):
            raise InputError(f"{folder / _CONFIG} has no {key}; copy the folder again")
    for file, digest in config["sha256"].items():
        if not (folder / file).exists():
            raise InputError(f"{folder / file} is missing; copy the whole folder again")
        if _sha256(folder / file) != digest:
            raise InputError(
                f"{folder / file} is damaged or was changed (its checksum is not the one written with "
                "it); copy the folder again"
            )
    adapter = read_object(folder / "adapter_config.json", f"{folder} has no adapter_config.json; copy the folder again")
    keys = ("base_model", "fingerprint", "method", "settings", "num_data")
    normalisation = config.get("normalisation", "sum")  # earlier versions had no other
    origin = Origin(adapter, **{k: cast(Any, config.get(k)) for k in keys}, normalisation=normalisation)
    try:
        members = tuple(_read_posterior(folder / f"member-{i}") for i in range(int(config["members"])))
        if family is Mixture:
            return Mixture(members, origin)
        parts: dict[str, Any] = dict(config["scalars"])
        spread = _read_tensors(folder / _SPREAD) if (folder / _SPREAD).exists() else {}
        for key, value in spread.items():
            field, _, name = key.partition("/")
            parts.setdefault(field, {})[name] = value
        if members:
            return family(posterior=members[0], origin=origin, **parts)
        return family(mean=_read_tensors(folder / _ADAPTER), origin=origin, **parts)
    except (TypeError, KeyError) as error:
        raise InputError(f"{folder} lacks a part of a {config['family']} ({error}); copy the folder again") from error


def _origin(posterior: Posterior) -> Origin:
    """Return the posterior's origin, or refuse."""
    if posterior.origin is None:
        raise InputError("a posterior without an origin cannot be written; build it with origin=origin_of(model)")
    return posterior.origin
