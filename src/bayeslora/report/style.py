"""What all figures share: a colour and a dash pattern for each method, the page, and the file.

Nothing here touches matplotlib's global state: figures are made without ``pyplot`` and settings hold inside
`styled` only. matplotlib is imported when a figure is asked for.
"""

from __future__ import annotations

import io
import math
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bayeslora.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#222222"
QUIET = "#767676"
RULE = "#C8C8C8"
SMALL = 8.5

_WIDTHS = {1: 4.4, 2: 6.6}
_SETTINGS: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "text.usetex": False,
    "axes.facecolor": "white",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlepad": 5.0,
    "axes.linewidth": 0.7,
    "axes.grid": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3.0,
    "ytick.major.size": 3.0,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
    "figure.facecolor": "white",
    "hatch.linewidth": 0.6,
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "bayeslora",
}


@dataclass(frozen=True)
class Look:
    """How one predictor is drawn in every figure.

    Attributes:
        colour: Hexadecimal colour.
        dash: matplotlib's dash pattern, which tells lines apart without colour.
    """

    colour: str
    dash: tuple[float, tuple[float, ...]]


_SOLID, _DASHED, _DOTTED = (0.0, ()), (0.0, (5.0, 1.6)), (0.0, (1.2, 1.4))
_DASH_DOT, _LONG = (0.0, (6.0, 1.6, 1.2, 1.6)), (0.0, (10.0, 2.2))
_METHODS = {
    "map": Look("#5F6368", _DASHED),
    "ensemble": Look("#E08A00", _SOLID),
    "swag": Look("#1567B3", _SOLID),
    "multiswag": Look("#53B1E6", _DASH_DOT),
    "blob": Look("#00876C", _LONG),
    "ivon": Look("#C4451C", _DASHED),
    "laplace": Look("#C66BA5", _SOLID),
    "mc-dropout": Look("#7A1F5C", _DOTTED),
    "tfb": Look("#8E8B1F", _DASH_DOT),
    "temperature": Look("#B09A78", _LONG),
    "isotropic": Look("#3A2C8C", _DASH_DOT),
}
_ALIASES = {"mean": "map", "draws": "swag", "deep-ensemble": "ensemble", "multi-swag": "multiswag"}


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Choose how each predictor of a figure is drawn; a method looks the same in every figure.

    A name that is a method, or begins with one as in ``swag (10 draws)``, gets the look of that method; the first such
    name where there are several. All others get the looks that are left, in order.

    Args:
        names: Names of the predictors, in the order of the figure.

    Returns:
        Name -> look, in the same order.
    """
    wanted = list(names)
    chosen: dict[str, Look] = {}
    for method_of in (_named, _prefixed):
        for name in wanted:
            look = _METHODS.get(method_of(name))
            if name not in chosen and look is not None and look not in chosen.values():
                chosen[name] = look
    free = [look for look in _METHODS.values() if look not in chosen.values()] or list(_METHODS.values())
    for rank, name in enumerate(name for name in wanted if name not in chosen):
        chosen[name] = free[rank % len(free)]
    return {name: chosen[name] for name in wanted}


@contextmanager
def styled() -> Iterator[None]:
    """Apply the settings of all figures inside the block; the caller's settings come back after it.

    Yields:
        Nothing.

    Raises:
        InputError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise InputError("plots need matplotlib: pip install 'bayeslora[plot]'") from error
    with matplotlib.rc_context(_SETTINGS):
        yield


def grid(panels: int) -> tuple[int, int]:
    """Choose rows and columns for a number of panels: at most four columns, the rows as even as can be.

    Args:
        panels: Number of panels, at least 1.

    Returns:
        ``(rows, columns)``.
    """
    rows = math.ceil(panels / 4)
    return rows, math.ceil(panels / rows)


def page(columns: int, height: float) -> Figure:
    """Make an empty figure as wide as its columns need, at most 9 inches (100 pixels an inch at 900 pixels).

    Args:
        columns: Number of panels side by side.
        height: Height in inches.

    Returns:
        The figure, which belongs to no window and no ``pyplot`` state.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTHS.get(columns, 9.0), height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05, wspace=0.03, hspace=0.03)
    return figure


def shortened(name: str, columns: int) -> str:
    """Cut a predictor's name to what fits above one of the panels, ending in an ellipsis where it was cut.

    Args:
        name: The name.
        columns: Number of panels side by side.

    Returns:
        The name, or its beginning.
    """
    limit = {1: 30, 2: 22, 3: 20}.get(columns, 13)
    return name if len(name) <= limit else name[: limit - 1].rstrip() + "…"


def percent_axis(axes: Axes, which: Literal["x", "y"], labels: bool = True) -> None:
    """Let an axis run from 0 to 100 %, with ticks at every quarter and words at every half.

    Args:
        axes: Axes to change.
        which: ``x`` or ``y``.
        labels: Whether the ticks are labelled.
    """
    words = ["0", "", "50 %", "", "100 %"] if labels else []
    if which == "x":
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], words or [""] * 5)
    else:
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], words or [""] * 5)


def render(figure: Figure, suffix: Literal["png", "svg"]) -> bytes:
    """Draw a figure on white; the same figure gives the same bytes.

    Args:
        figure: The figure.
        suffix: ``png`` (150 dots an inch) or ``svg`` (text as outlines, no date).

    Returns:
        Content of the file.
    """
    content = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if suffix == "svg" else {"Software": None}
    with styled():
        figure.savefig(content, format=suffix, dpi=150, facecolor="white", metadata=metadata)
    return content.getvalue()


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure to a file, whole or not at all.

    Args:
        figure: The figure.
        path: A ``.png`` or ``.svg`` file; missing folders are made, an existing file is replaced.

    Raises:
        InputError: If the suffix is another, or the file cannot be written there.
    """
    target = Path(path)
    match target.suffix.lower():
        case ".png":
            content = render(figure, "png")
        case ".svg":
            content = render(figure, "svg")
        case _:
            raise InputError(f"cannot write a figure to {target}; give a path that ends in .png or .svg.")
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        raise InputError(f"cannot write the figure to {target} ({error.strerror}); choose another path.") from error
    finally:
        partial.unlink(missing_ok=True)


def _named(name: str) -> str:
    """Return a predictor's name as the methods are written: lower case, joined by hyphens."""
    plain = "-".join(name.lower().replace("_", " ").split())
    return _ALIASES.get(plain, plain)


def _prefixed(name: str) -> str:
    """Return the longest method that a name begins with, followed by no letter or digit; empty if there is none."""
    plain = _named(name)
    fits = [m for m in (*_METHODS, *_ALIASES) if plain.startswith(m) and not plain[len(m) : len(m) + 1].isalnum()]
    return _named(max(fits, key=len, default=""))
