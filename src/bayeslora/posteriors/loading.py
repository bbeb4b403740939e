"""Posteriors from a folder or from the Hub, and draws as plain adapters.

``adapter_config.json`` and ``adapter_model.safetensors`` are the mean, for every tool that reads PEFT adapters.
``posterior_config.json`` holds family, method, base model and checksums, ``posterior.safetensors`` the spread,
``README.md`` is the card. Members of a mixture, and the posterior that another is made of, are sub-folders. A folder
appears at once, when all of it is written.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from bayeslora.errors import InputError
from bayeslora.files import atomic_folder, read_object, undisturbed
from bayeslora.params import check_against, lora_parameters
from bayeslora.posteriors.base import FAMILIES, Posterior
from bayeslora.posteriors.folder import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONFIG,
    read_folder,
    read_tensors,
    write_adapter,
)
from bayeslora.posteriors.hub import fetch
from bayeslora.posteriors.point import Point
from bayeslora.posteriors.provenance import Origin, check_base
from bayeslora.posteriors.sampling import Draws, former_keywords


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
    posterior = undisturbed(fetch(name, revision, token), _read)
    if model is not None:
        check_base(posterior.require_origin(), model)
        check_against(posterior.mean, lora_parameters(model))
    return posterior


def load_adapter(name: str | Path, *, revision: str | None = None) -> Posterior:
    """Read a posterior, or a plain PEFT adapter as a point, whose origin has no fingerprint of its base."""
    # only the one who trained it could have taken that: the point is for `params.write`, not for `predict`
    folder = fetch(name, revision)
    if (folder / CONFIG).exists():
        return load_posterior(folder)
    missing = f"{folder} is neither a posterior of bayeslora nor a PEFT adapter (it has no {ADAPTER_CONFIG})"
    config = read_object(folder / ADAPTER_CONFIG, missing)
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{folder} is an adapter of type {config.get('peft_type')}; bayeslora serves LoRA adapters only"
        )
    origin = Origin(config, str(config.get("base_model_name_or_path") or ""), {})
    return Point(read_tensors(folder / ADAPTER), origin)


@former_keywords(seed="draws.seed", sampling="draws.sampling")
def export_draws(posterior: Posterior, folder: str | Path, draws: int | Draws, *, name: str = "draw") -> list[Path]:
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
    names = [f"{name}-{k:03d}" for k in range(posterior.count(draws))]
    with atomic_folder(target) as work:
        for k, adapter in enumerate(names):
            (work / adapter).mkdir()
            write_adapter(posterior.draw(k, draws.seed, draws.sampling), posterior.require_origin(), work / adapter)
    return [target / adapter for adapter in names]


def _read(folder: Path) -> Posterior:
    """Read one posterior, and what it is made of."""
    content = read_folder(folder)
    family = FAMILIES.get(content.family)
    if family is None:
        raise InputError(f"{folder / CONFIG} names the family {content.family!r}; known: {', '.join(FAMILIES)}")
    try:
        members = tuple(_read(folder / f"member-{i}") for i in range(content.members))
        return family.from_parts(content, members)
    except (TypeError, KeyError) as error:
        raise InputError(f"{folder} lacks a part of a {content.family} ({error}); copy the folder again") from error
