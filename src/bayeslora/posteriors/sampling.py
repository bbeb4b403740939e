"""Draws as a request."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Literal, ParamSpec, TypeVar, final, get_args

from bayeslora.errors import InputError

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
