"""The study's lines: one JSON object a run, in a file a cell, added when the run is done and never half.

A line has ``cell``, ``seed`` and ``row`` (the method, and what was done to it), the ``key`` of all that it depends on,
``versions``, ``config``, ``cost``, ``metrics`` by predictor, and ``rows``: the packed log-probabilities and mutual
information of the test rows and of each foreign set, from which every question can be answered again. Of two lines of
one run the later counts.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"


def packed(values: Tensor) -> dict[str, Any]:
    """Return numbers of at most two dimensions as text: half precision, compressed."""
    array = values.detach().cpu().numpy().astype(np.float16)
    return {"shape": list(array.shape), "half": base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()}


def unpacked(content: dict[str, Any]) -> Tensor:
    """Return packed numbers in double precision; log-probabilities [N C] as such again, each row summing to one."""
    array = np.frombuffer(zlib.decompress(base64.b64decode(content["half"])), np.float16)
    values = torch.from_numpy(array.astype(np.float64)).view(content["shape"])
    return values.log_softmax(-1) if values.ndim == 2 else values


def read(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the lines of some files, the last of each run."""
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    for line in _lines(files):
        found[line["cell"], line["seed"], line["row"]] = line
    return list(found.values())


def _lines(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Yield every line; one that was cut off is left out, for it is the end of a run that was stopped."""
    for file in files:
        for text in file.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(text)
            except json.JSONDecodeError:
                continue


def add(file: Path, some: Iterable[dict[str, Any]]) -> None:
    """Add lines to a file in one write, on lines of their own even after one that was cut off."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cut = file.exists() and file.stat().st_size and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as stream:
        stream.write(("\n" if cut else "") + "".join(json.dumps(line, allow_nan=False) + "\n" for line in some))
