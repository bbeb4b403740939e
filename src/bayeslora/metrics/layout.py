"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(cells: Sequence[Sequence[str]], *, numbers: bool = False) -> list[str]:
    """Return a table's lines with each column as wide as its widest cell; ``numbers`` end where their column ends."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if numbers and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded) if numbers else "  ".join(padded).rstrip())
    return lines
