"""How the passes over the data are run: what it costs, not what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class PassOptions:
    """How the passes over the data are run; none of it changes a number by more than rounding.

    Attributes:
        stack: Whether several draws may share a pass over the base, where the model allows it.
        share_prefix: Whether a prefix that all prompts have in common may be run once for each draw, where the model
            allows it.
        compile: Whether to compile the model's layers with `torch.compile`: sooner where there are many rows, for
            compiling takes about a minute. It does not apply to linearised posteriors.
        progress: Whether to show a bar with the time left.
    """

    stack: bool = True
    share_prefix: bool = True
    compile: bool = False
    progress: bool = False
