"""What the benchmarks share: rows with bounds, the machine in words, and the JSON file."""

from __future__ import annotations

import json
import platform
from typing import Any

import torch


def row(name: str, value: float, bound: float | None, unit: str = "ratio") -> dict[str, Any]:
    """Return one row of the JSON; without a bound it is met."""
    return {
        "name": name,
        "value": round(value, 4),
        "unit": unit,
        "bound": bound,
        "met": bound is None or value <= bound,
    }


def machine() -> str:
    """Return the machine in words."""
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{kind}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def finish(rows: list[dict[str, Any]], path: str | None) -> None:
    """Print the rows, and write them if a file is named."""
    for found in rows:
        verdict = "" if found["bound"] is None else f"bound {found['bound']}  {'met' if found['met'] else 'NOT MET'}"
        print(f"{found['name']:<50} {found['value']:.3f} {found['unit']}  {verdict}")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"machine": machine(), "rows": rows}, file, indent=2)
