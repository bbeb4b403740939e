"""Posteriors from a folder or from the Hub, and draws as plain adapters.

``adapter_config.json`` and ``adapter_model.safetensors`` are the mean, for every tool that reads PEFT adapters.
``posterior_config.json`` holds family, method, base model and checksums, ``posterior.safetensors`` the spread,
``README.md`` is the card. Members of a mixture, and the posterior that another is made of, are sub-folders. A folder
appears at once, when all of it is written.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, cast, get_type_hints

import torch
from torch import nn

from bayeslora.errors import InputError
from bayeslora.files import atomic_folder, undisturbed
from bayeslora.params import Params, check_against, lora_parameters
from bayeslora.posteriors.base import FAMILIES, Posterior
from bayeslora.posteriors.folder import (
    CONFIG,
    LARGEST,
    Content,
    member_folder,
    read_adapter,
    read_folder,
    write_adapter,
)
from bayeslora.posteriors.hub import fetch
from bayeslora.posteriors.point import Point
from bayeslora.posteriors.provenance import Origin, check_base
from bayeslora.posteriors.sampling import Draws, former_keywords
from bayeslora.posteriors.schema import scalar_rule


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
    config, mean = read_adapter(folder)
    return Point(mean, Origin(config, str(config.get("base_model_name_or_path") or ""), {}))


@former_keywords(seed="draws.seed", sampling="draws.sampling")
def export_draws(posterior: Posterior, folder: str | Path, draws: int | Draws, *, name: str = "draw") -> list[Path]:
    """Write draws as plain PEFT adapters, for any tool that reads them.

    Args:
        posterior: Any posterior with an origin.
        folder: Where to; it gets a sub-folder ``draw-000`` … for each draw.
        draws: How many, or `Draws`; rounded up to whole groups of the sampling. 0 for the mean, in a sub-folder
            ``mean``.
        name: What stands in the place of ``draw``, so that one server can hold adapters of several exports.

    Returns:
        The adapters' folders.

    Raises:
        InputError: If the name is no name of a folder and an adapter, the draws are no adapters, or the folder cannot
            be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"the adapters' name {name!r} must be of letters, digits, '.', '_' and '-'")
    target, draws = Path(folder), Draws.of(draws)
    if draws.count and posterior.before_answer is not None:
        raise InputError(
            "noise on the answer's tokens only is no adapter, whose noise is on all tokens; export the posterior as it "
            "was before (--noise all), or the mean (draws=0)"
        )
    names = [f"{name}-{k:03d}" for k in range(posterior.count(draws))]
    if not draws.count:
        posterior, names = Point(posterior.mean, posterior.origin), ["mean" if name == "draw" else f"{name}-mean"]
    with atomic_folder(target) as work:
        for k, adapter in enumerate(names):
            (work / adapter).mkdir()
            write_adapter(posterior.draw(k, draws.seed, draws.sampling), posterior.require_origin(), work / adapter)
    return [target / adapter for adapter in names]


def _read(folder: Path, depth: int = 8) -> Posterior:
    """Read one posterior, and what it is made of."""
    if not depth:
        raise InputError(f"{folder} is nested too deeply; copy the folder again")
    content = read_folder(folder)
    family = FAMILIES.get(content.family)
    if family is None:
        known = ", ".join(FAMILIES)
        raise InputError(f"{folder / CONFIG} names the family {content.family[:60]!r}; known: {known}")
    inner = [member_folder(folder, i) for i in range(content.members)]
    for each in inner:
        if each.is_symlink():
            raise InputError(f"{each} is a link; copy the folder itself there")
    members = tuple(_read(each, depth - 1) for each in inner)
    try:
        _check_parts(family, content)
        posterior = family.from_parts(content, members)
        _check_draws(posterior, content)
        return posterior
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    except (
        TypeError,
        KeyError,
        ValueError,
        IndexError,
        AttributeError,
        RuntimeError,
    ) as error:  # shapes that do not go together
        first = (str(error).splitlines() or [""])[0][:200]
        raise InputError(f"{folder} lacks a part of a {content.family} ({first}); copy the folder again") from error


def _check_parts(family: type[Posterior], content: Content) -> None:
    """Refuse parts that are no fields of a family, or of another kind than its fields, or another number of members."""
    kinds, names = get_type_hints(family), {field.name for field in fields(cast(Any, family))}
    own = names - {"mean", "origin", "members", "posterior"}
    for name in (*content.tensors, *content.scalars):
        if name not in own or (name in content.tensors) != (kinds[name] == Params):
            raise InputError(f"a {content.family} has no part {name[:60]!r} of that kind; copy the folder again")
    for name, value in content.scalars.items():
        rule = scalar_rule(kinds[name])
        if not rule.holds(value):
            raise InputError(f"the {name} of a {content.family} must be {rule.words}, and it is {str(value)[:60]!r}")
    if ("members" in names) != (content.members > 1) and content.members != int(bool({"members", "posterior"} & names)):
        raise InputError(f"a {content.family} is not made of {content.members} posteriors; copy the folder again")


def _check_draws(posterior: Posterior, content: Content) -> None:
    """Refuse a posterior whose mean is not the plain adapter of its folder, or of which a draw is not finite."""
    mean = posterior.mean
    if mean.keys() != content.mean.keys() or not all(torch.equal(mean[name], content.mean[name]) for name in mean):
        raise InputError("the plain adapter is not the mean of what the posterior is made of; copy the folder again")
    if content.members or not posterior.draws_are_weights:
        return
    if not all(bool((value.abs() <= LARGEST).all()) for value in posterior.draw(0).values()):
        raise InputError(f"a draw of the {content.family} is not finite; copy the folder again")
