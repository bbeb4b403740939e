"""What all plots share: a colour and a dash pattern for each method, the figure with its panels, and the file.

The settings are those of ``bayeslora.mplstyle``. matplotlib is imported when a plot is asked for, and its global state
stays as it is: figures are made without ``pyplot``, and settings hold inside `styled` only.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bayeslora.errors import InputError
from bayeslora.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

Settings = dict[str, Any]
"""Keyword arguments of matplotlib's artists."""

INK = "#222222"
QUIET = "#767676"
SMALL = 8.5

_WIDTHS = {1: 4.4, 2: 6.6}
_LENGTHS = {1: 30, 2: 22, 3: 22}
_GAP = 0.16
"""Height in inches between the rows of predictors."""


@dataclass(frozen=True)
class Look:
    """How one predictor is drawn in every plot: a hexadecimal colour, and a dash pattern that serves without colour."""

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
    "base": Look("#000000", _SOLID),
}
_ALIASES = {
    "mean": "map",
    "draws": "swag",
    "deep-ensemble": "ensemble",
    "multi-swag": "multiswag",
    "map-+-t": "temperature",
}


@dataclass(frozen=True)
class Column:
    """The panels of one predictor, one above the other, by their kind; ``first`` says whether it is the leftmost."""

    name: str
    colour: str
    first: bool
    panels: Mapping[str, Axes]


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Choose how each predictor of a plot is drawn; a method looks the same in every plot."""
    # A name that is a method, or begins with one as in "swag (10 draws)", has the look of that method; the first such
    # name where there are several. All others have the looks that are left, in order.
    wanted = list(names)
    chosen: dict[str, Look] = {}
    for method_of in (_method, _prefix):
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
    """Apply matplotlib's defaults and our style file inside the block; the caller's settings come back after it."""
    try:
        import matplotlib.style
    except ModuleNotFoundError as error:
        raise InputError("plots need matplotlib: pip install 'bayeslora[plot]'") from error
    with matplotlib.style.context(["default", "bayeslora.comparison.plots.bayeslora"]):
        yield


def grid(panels: int) -> tuple[int, int]:
    """Choose rows and columns for a number of panels: at most four columns, the rows as even as can be."""
    rows = math.ceil(panels / 4)
    return rows, math.ceil(panels / rows)


def side(columns: int) -> float:
    """Return the side of a square panel in inches."""
    return 7.4 / columns if columns > 2 else 2.9


def new_figure(columns: int, height: float) -> Figure:
    """Make an empty figure of a height in inches, as wide as its columns need: at most 9 inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTHS.get(columns, 9.0), height))


def new_columns(
    names: Sequence[str], heights: Mapping[str, float], row_margin: float, margin: float
) -> tuple[Figure, list[Column]]:
    """Make panels ``KIND NAME`` for each predictor, of heights by kind, with margins for words, all in inches."""
    rows, columns = grid(len(names))
    figure = new_figure(columns, rows * (sum(heights.values()) + row_margin) + (rows - 1) * _GAP + margin)
    stride = len(heights) + 1
    ratios = [*heights.values(), _GAP] * rows
    cells = figure.add_gridspec(stride * rows - 1, columns, height_ratios=ratios[:-1])
    by_name = []
    for place, (name, look) in enumerate(looks(names).items()):
        row, column = divmod(place, columns)
        panels = {
            kind: figure.add_subplot(cells[row * stride + step, column], label=f"{kind} {name}")
            for step, kind in enumerate(heights)
        }
        by_name.append(Column(name, look.colour, column == 0, panels))
    return figure, by_name


def headline(axes: Axes, name: str, columns: int, words: str) -> None:
    """Write a predictor's name over a panel, cut to the width of one of so many columns, and words under the name."""
    axes.set_title(words)
    axes.annotate(
        shortened(name, _LENGTHS.get(columns, 16)),
        (0, 1),
        xytext=(0, 20),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=11.5,
        fontweight="bold",
    )


def shortened(name: str, limit: int = 24) -> str:
    """Cut a name to a number of characters, the last of which is then an ellipsis."""
    return name if len(name) <= limit else name[: limit - 1].rstrip() + "…"


def percent(value: float, _: float) -> str:
    """Return a share as a tick's label."""
    return f"{100 * value:.3g} %" if value else "0"


def percent_axis(axes: Axes, which: Literal["x", "y"], label: str, *, labels: bool = True, low: float = 0.0) -> None:
    """Let an axis run from ``low`` (0 or a half) to 100 %, with ticks at every quarter, labelled or bare."""
    words = {0.0: "0", 0.25: "", 0.5: "50 %", 0.75: "75 %" if low else "", 1.0: "100 %"}
    ticks = [tick for tick in words if tick >= low]
    shown = [words[tick] if labels else "" for tick in ticks]
    settings: Settings = {"lim": (low, 1), "ticks": ticks, "ticklabels": shown, "label": label if labels else ""}
    axes.set(**{f"{which}{name}": value for name, value in settings.items()})


def legend_beside(axes: Axes, title: str, handles: Sequence[Artist], words: Sequence[str], **settings: float) -> Legend:
    """Put a legend to the right of the axes."""
    place: Settings = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "alignment": "left"}
    return axes.legend(handles, words, title=title, **place, **settings)


def render(figure: Figure, suffix: Literal["png", "svg"]) -> bytes:
    """Return a figure as ``png`` (150 dots an inch) or ``svg`` (text as outlines); each time the same bytes."""
    content = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if suffix == "svg" else {"Software": None}
    with styled():
        figure.savefig(content, format=suffix, metadata=metadata)
    return content.getvalue()


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure to a ``.png`` or ``.svg`` file, whole or not at all, in place of a file that is there."""
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in (".png", ".svg"):
        raise InputError(f"cannot write a figure to {target}; give a path that ends in .png or .svg")
    content = render(figure, "png" if suffix == ".png" else "svg")
    try:
        with atomic_file(target) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write the figure to {target} ({error.strerror}); choose another path") from error


def _method(name: str) -> str:
    """Return a predictor's name as the methods are written: lower case, joined by hyphens."""
    plain = "-".join(name.lower().replace("_", " ").split())
    return _ALIASES.get(plain, plain)


def _prefix(name: str) -> str:
    """Return the longest method that a name begins with, followed by no letter or digit; empty if there is none."""
    plain = _method(name)
    fits = [m for m in (*_METHODS, *_ALIASES) if plain.startswith(m) and not plain[len(m) : len(m) + 1].isalnum()]
    return _method(max(fits, key=len, default=""))
