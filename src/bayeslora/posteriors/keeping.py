"""What a posterior keeps from one prediction to the next: draws up to a bound, and its copy on an accelerator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast, final

import torch
from torch import Tensor

from bayeslora.params import Params
from bayeslora.posteriors.sampling import Draws, Sampling

if TYPE_CHECKING:
    from bayeslora.posteriors.base import Posterior

P = TypeVar("P", bound="Posterior")

CACHED_NUMBERS = 2**24
"""Numbers of all draws that are kept with a posterior: 64 MiB."""


@final
class Kept:
    """What is kept with one posterior; empty at first."""

    def __init__(self) -> None:
        self._draws: dict[tuple[int, int, Sampling], Params] = {}
        self._copy: tuple[Mapping[str, torch.device], Posterior] | None = None

    def draw(self, posterior: Posterior, index: int, draws: Draws) -> Params:
        """Return a draw of the posterior, and keep it while there is room."""
        key = (index, draws.seed, draws.sampling)
        if key in self._draws:
            return self._draws[key]
        draw = posterior.draw(*key)
        size = sum(value.numel() for value in draw.values())
        if (len(self._draws) + 1) * size <= CACHED_NUMBERS:
            self._draws[key] = draw
        return draw

    def placed(self, posterior: P, devices: Mapping[str, torch.device]) -> P:
        """Return the posterior with its tensors on some devices, and keep the copy until others are asked for."""
        if self._copy is None or self._copy[0] != devices:
            self._copy = (dict(devices), _copied(posterior, devices))
        return cast(P, self._copy[1])


def numbers(posterior: Posterior) -> int:
    """Return how many numbers a posterior's tensors have, with those of what it is made of."""
    values = _values(posterior)
    inner = [*values.get("members", ()), *([values["posterior"]] if "posterior" in values else [])]
    parts = [part for part in values.values() if isinstance(part, Mapping)]
    own = sum(value.numel() for part in parts for value in part.values() if isinstance(value, Tensor))
    return own + sum(map(numbers, inner))


def _copied(posterior: P, devices: Mapping[str, torch.device]) -> P:
    """Return a posterior with the tensors of each parameter on its device."""
    changes: dict[str, object] = {}
    for name, value in _values(posterior).items():
        if name == "posterior":
            changes[name] = _copied(value, devices)
        elif name == "members":
            changes[name] = tuple(_copied(member, devices) for member in value)
        elif isinstance(value, Mapping):
            changes[name] = {
                k: v.to(devices[k]) if isinstance(v, Tensor) and k in devices else v for k, v in value.items()
            }
    return replace(cast(Any, posterior), **changes)


def _values(posterior: Posterior) -> dict[str, Any]:
    """Return a posterior's fields by name."""
    return {field.name: getattr(posterior, field.name) for field in fields(cast(Any, posterior))}
