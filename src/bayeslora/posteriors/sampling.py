"""Draws as a request, and the noise that they are made of."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Literal, ParamSpec, TypeVar, final, get_args

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from bayeslora.errors import InputError
from bayeslora.params import generator, seed_of

Sampling = Literal["independent", "antithetic", "simplex", "sobol"]
"""How the draws of a stream belong together: not at all; each odd draw mirrors the one before it at the mean; the noise
of a group of draws sums to zero; or they are Sobol's sequence with a random digital shift, so that each number of each
parameter fills its distribution evenly. Each draw by itself has the posterior's distribution in all four."""


GROUPS: Mapping[Sampling, int] = {"independent": 1, "antithetic": 2, "simplex": 5, "sobol": 1}
"""How many draws of a posterior belong together so that a part of them loses what they are for."""


@final
@dataclass(frozen=True)
class Draws:
    """Which draws to take from a posterior; an ``int`` serves where only the count is not the usual.

    Attributes:
        count: Number S of draws, rounded up: a mixture's members get equally many, antithetic draws come in pairs and
            simplex draws in fives. There are never more than there are different draws: 1 for a point, M for an
            ensemble of M points. 0 is the mean, in one pass.
        seed: Which stream of draws. Draw k of a stream is the same weights in every call.
        sampling: How the draws belong together: ``independent``, ``antithetic``, ``simplex`` or ``sobol``; ``simplex``
            gets most from few of them.
        tolerance: An example takes no more draws once the standard error of its probabilities is at most this; None for
            ``count`` draws of each. `bayeslora.predict` alone looks at it.
        minimum: Draws of each example before the first look at the error.

    Raises:
        InputError: If a number makes no sense.
    """

    count: int = 10
    seed: int = 0
    sampling: Sampling = "independent"
    tolerance: float | None = None
    minimum: int = 4

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.sampling not in get_args(Sampling):
            raise InputError(f"sampling must be one of {', '.join(get_args(Sampling))}, and it is {self.sampling!r}")
        if self.tolerance is not None and not 0 < self.tolerance < math.inf:
            raise InputError(f"tolerance must be finite and positive, and it is {self.tolerance}")
        if self.minimum < 2:
            raise InputError(f"minimum must be at least 2, for one draw has no error, and it is {self.minimum}")
        if self.count < 0:
            raise InputError(f"draws must be at least 0, which is the mean, and it is {self.count}")

    @classmethod
    def of(cls, draws: int | Draws) -> Draws:
        """Return a number of draws as draws, and draws as they are."""
        return draws if isinstance(draws, Draws) else cls(draws)


_P = ParamSpec("_P")
_R = TypeVar("_R")


def former_keywords(**now: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Return what lets a function accept keywords of the last release; each says what it is now: ``seed="draws.seed"``.

    The parameter ``draws`` takes `Draws`, any other what its default is.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        """Return the function, which then takes its former keywords too."""
        signature = inspect.signature(function)

        @wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            """Call the function with former keywords as fields, and a warning of its caller."""
            former = {name: kwargs.pop(name) for name in now if name in kwargs}
            if not former:
                return function(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            for parameter in dict.fromkeys(now[name].partition(".")[0] for name in former):
                names = [name for name in former if now[name].startswith(f"{parameter}.")]
                default = signature.parameters[parameter].default
                value = bound.arguments.get(parameter, default)
                kind: type = Draws if parameter == "draws" else type(default)
                if parameter in bound.arguments and isinstance(value, kind):
                    one = f"{parameter}={kind.__name__}(…)"
                    raise InputError(f"{', '.join(names)}: a field of {one}; give it there alone")
                values = {now[name].partition(".")[2]: former[name] for name in names}
                if not isinstance(value, kind):  # a number of draws
                    values = {"count": value, **values}
                text = ", ".join(f"{name}={value!r}" for name, value in values.items())
                warnings.warn(
                    f"{function.__qualname__}: {'=, '.join(names)}= will go with the next release; "
                    f"write {parameter}=bl.{kind.__name__}({text})",
                    DeprecationWarning,
                    stacklevel=2,
                )
                bound.arguments[parameter] = kind(**values)
            return function(*bound.args, **bound.kwargs)

        setattr(call, "former_keywords", tuple(now))  # noqa: B010
        return call

    return decorate


def noise(seed: int, index: int, name: str, like: Tensor, sampling: Sampling = "independent") -> Tensor:
    """Return standard normal numbers that belong to one parameter of one draw: of ``like``'s shape, float32, CPU."""
    if sampling == "sobol":
        return torch.special.ndtri(_sobol(seed, index, name, like)).float()
    if sampling == "simplex":
        return _simplex(seed, index, name, like)
    mirror = index % 2 if sampling == "antithetic" else 0
    numbers = torch.randn(like.shape, generator=generator(seed, index - mirror, name))
    return -numbers if mirror else numbers


def uniform(seed: int, index: int, name: str, like: Tensor, sampling: Sampling = "independent") -> Tensor:
    """Return numbers uniform on [0, 1] that belong to one parameter of one draw; see `noise`."""
    if sampling == "sobol":
        return _sobol(seed, index, name, like).float()
    if sampling == "simplex":
        return torch.special.ndtr(_simplex(seed, index, name, like))
    mirror = index % 2 if sampling == "antithetic" else 0
    numbers = torch.rand(like.shape, generator=generator(seed, index - mirror, name))
    return 1 - numbers if mirror else numbers


def _simplex(seed: int, index: int, name: str, like: Tensor) -> Tensor:
    """Return standard normal numbers that sum to zero over the draws of a group; any two correlate by -1/(K-1).

    z_i = √(K/(K−1)) (ε_i − ε̄), the most negative correlation that K exchangeable normal numbers can have (antithetic
    coupling of K processes: Craiu and Meng 2005, Annals of Statistics 33). A group's average of what is linear in the
    noise is exact, as with pairs that mirror each other. Its average of what is quadratic is worth K − 1 independent
    draws; a pair's is worth one.
    """
    size = GROUPS["simplex"]
    group, place = divmod(index, size)
    every = torch.randn((size, *like.shape), generator=generator(seed, "simplex", group, name))
    return math.sqrt(size / (size - 1)) * (every[place] - every.mean(0))


_BITS = 30
"""Binary digits of torch's Sobol numbers, and of the index of a point."""


def _sobol(seed: int, index: int, name: str, like: Tensor) -> Tensor:
    """Return a point of Sobol's sequence in (0, 1), its digits shifted at random; float64.

    Every parameter has the sequence in an order of its own, for the same dimension in the same order would correlate
    two parameters. One with more numbers than the sequence has dimensions takes it several times.
    """
    size, most = like.numel(), SobolEngine.MAXDIM
    keys = [(seed, "sobol", name, *([part] if part else [])) for part in range(0, max(size, 1), most)]
    points = [sobol_digits(_shuffled(index, *key), min(size, most)) for key in keys]
    shift = torch.randint(0, 2**_BITS, (size,), generator=generator(seed, "sobol", name))
    digits = torch.cat(points)[:size] ^ shift
    return ((digits.double() + 0.5) / 2**_BITS).view(like.shape)


def _shuffled(index: int, *key: object) -> int:
    """Return another index, one to one, so that blocks of 2^m indices stay blocks (Burley 2020, JCGT 9(4), §3)."""
    # a random flip of each binary digit, which depends on the digits above it: Owen's scrambling, of the index
    below = range(index.bit_length() - 1)
    return seed_of(*key) % 2**_BITS ^ index ^ sum(seed_of(*key, b, index >> b + 1) % 2 << b for b in below)


def sobol_digits(index: int, dimensions: int) -> Tensor:
    """Return the digits of a point of Sobol's sequence as integers: its direction numbers at the Gray code's ones."""
    directions, gray = _directions(dimensions), index ^ index >> 1
    point = torch.zeros_like(directions[0])
    for bit in range(gray.bit_length()):
        if gray >> bit & 1:
            point ^= directions[bit]
    return point


@lru_cache(maxsize=8)
def _directions(dimensions: int) -> Tensor:
    """Return the sequence's direction numbers [bits dimensions] as integers."""
    engine = SobolEngine(dimensions)  # type: ignore[no-untyped-call]
    return engine.sobolstate.T.contiguous()
