"""The adapters that benchmarks compare: the papers' small one, and what users train."""

from __future__ import annotations

import argparse
from typing import Any

from peft import LoraConfig

ADAPTERS: dict[str, dict[str, Any]] = {
    "q,v r=8": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "all r=16": {"r": 16, "target_modules": "all-linear"},
}


def adapter(name: str) -> LoraConfig:
    """Return the configuration of an adapter of a causal language model."""
    return LoraConfig(lora_alpha=16, task_type="CAUSAL_LM", **ADAPTERS[name])


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Let a benchmark be told which adapters to compare."""
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=list(ADAPTERS))


def named(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows whose names begin with the adapter's."""
    return [{**row, "name": f"{name}: {row['name']}"} for row in rows]
