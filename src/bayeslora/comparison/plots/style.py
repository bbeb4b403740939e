"""What all figures share: a colour and a dash pattern for each method, the page, and the file.

Nothing here touches matplotlib's global state: figures are made without ``pyplot`` and settings hold inside
`styled` only. matplotlib is imported when a figure is asked for.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bayeslora.errors import InputError
from bayeslora.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#222222"
QUIET = "#767676"
RULE = "#C8C8C8"
SMALL = 8.5

_WIDTHS = {1: 4.4, 2: 6.6}
_LENGTHS = {1: 30, 2: 22, 3: 22}
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


_SOLID, _DASHED, _DOTTED = (0.0, ()), (0.0, (5.0, 1.6)), (0.0, (1.2, 1.2))
_DASH_DOT, _DOT_DOT, _LONG = (0.0, (6.0, 1.4, 1.2, 1.4)), (0.0, (5.0, 1.2, 1.0, 1.2, 1.0, 1.2)), (0.0, (10.0, 2.2))
_SHORT = (0.0, (2.6, 1.0))
# Colours found by a search that keeps any two at least 24 apart (CIELAB) for normal, protan, deutan and tritan vision;
# methods that share a dash pattern differ in lightness.
_METHODS = {
    "map": Look("#656C75", _DASHED),
    "ensemble": Look("#EFAE00", _SOLID),
    "swag": Look("#3785FB", _SOLID),
    "multiswag": Look("#00CEE5", _DASH_DOT),
    "blob": Look("#087641", _LONG),
    "ivon": Look("#8F0000", _DOT_DOT),
    "laplace": Look("#9B4BA8", _SHORT),
    "mc-dropout": Look("#492756", _DOTTED),
    "tfb": Look("#A5953E", _DOTTED),
    "temperature": Look("#9BBA88", _DASHED),
    "isotropic": Look("#35169D", _DASH_DOT),
}
_ALIASES = {
    "mean": "map",
    "draws": "swag",
    "deep-ensemble": "ensemble",
    "multi-swag": "multiswag",
    "map-+-t": "temperature",
}


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Choose how each predictor of a figure is drawn; a method looks the same in every figure.

    A name that is a method, or begins with one as in ``swag (10 draws)``, gets the look of that method; the first such
    name where there are several; ``map + T`` gets that of ``temperature``. All others get the looks that are left, in
    order.

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
    """Apply matplotlib's defaults and the settings of all figures inside the block; the caller's come back after it.

    Yields:
        Nothing.

    Raises:
        InputError: If matplotlib is not installed.
    """
    try:
        import matplotlib.style
    except ModuleNotFoundError as error:
        raise InputError("plots need matplotlib: pip install 'bayeslora[plot]'") from error
    with matplotlib.style.context(["default", _SETTINGS]):
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
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.05, wspace=0.03, hspace=0.03)
    return Figure(figsize=(_WIDTHS.get(columns, 9.0), height), layout=layout)


def headline(axes: Axes, name: str, columns: int, words: str) -> None:
    """Write a predictor's name over a panel, cut to the panel's width, and a line of words under it.

    Args:
        axes: Axes of the panel.
        name: Name of the predictor.
        columns: Number of panels side by side.
        words: The line between the name and the panel.
    """
    axes.set_title(words, loc="left")
    axes.annotate(
        shortened(name, _LENGTHS.get(columns, 16)),
        (0, 1),
        xytext=(0, 20),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=11.5,
        fontweight="bold",
    )


def shortened(name: str, limit: int) -> str:
    """Cut a name to a number of characters.

    Args:
        name: The name.
        limit: Most characters.

    Returns:
        The name, or its beginning and an ellipsis.
    """
    return name if len(name) <= limit else name[: limit - 1].rstrip() + "…"


def percent_axis(axes: Axes, which: Literal["x", "y"], labels: bool = True, low: float = 0.0) -> None:
    """Let an axis run to 100 %, with ticks at every quarter and words at every half; at all if it begins at half.

    Args:
        axes: Axes to change.
        which: ``x`` or ``y``.
        labels: Whether the ticks are labelled.
        low: Where the axis begins, as a share.
    """
    words = {0.0: "0", 0.25: "", 0.5: "50 %", 0.75: "75 %" if low else "", 1.0: "100 %"}
    ticks = [tick for tick in words if tick >= low]
    shown = [words[tick] if labels else "" for tick in ticks]
    if which == "x":
        axes.set_xlim(low, 1)
        axes.set_xticks(ticks, shown)
    else:
        axes.set_ylim(low, 1)
        axes.set_yticks(ticks, shown)


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
    try:
        with atomic_file(target) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write the figure to {target} ({error.strerror}); choose another path.") from error


def _named(name: str) -> str:
    """Return a predictor's name as the methods are written: lower case, joined by hyphens."""
    plain = "-".join(name.lower().replace("_", " ").split())
    return _ALIASES.get(plain, plain)


def _prefixed(name: str) -> str:
    """Return the longest method that a name begins with, followed by no letter or digit; empty if there is none."""
    plain = _named(name)
    fits = [m for m in (*_METHODS, *_ALIASES) if plain.startswith(m) and not plain[len(m) : len(m) + 1].isalnum()]
    return _named(max(fits, key=len, default=""))
