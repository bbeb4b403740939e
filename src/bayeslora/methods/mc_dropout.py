"""MC dropout: the dropout of training, kept at prediction (Gal and Ghahramani 2016, arXiv 1506.02142).

Two kinds. ``tokens`` is what the paper and everybody's code do: each token has a mask of its own, so that a "draw" is a
stochastic pass and no network. ``columns``, our default, drops columns of A, one mask for all tokens and examples of a
draw: then a draw is an adapter that can be exported, generates coherently and can be served.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import nn

from bayeslora.errors import InputError
from bayeslora.methods.base import PostHoc, TrainedAdapter
from bayeslora.methods.guards import plain_layers
from bayeslora.params import Params, require_lora
from bayeslora.posteriors import ColumnDropout, TokenDropout
from bayeslora.posteriors.provenance import Origin
from bayeslora.tasks.types import Task


@final
@dataclass(frozen=True)
class McDropout(PostHoc[TokenDropout | ColumnDropout]):
    """Dropout at prediction.

    Attributes:
        kind: ``columns`` for draws that are adapters, or ``tokens``.
        rate: Probability p of being dropped; None for the adapter's ``lora_dropout``.
    """

    name: ClassVar[str] = "mc-dropout"
    kind: Literal["columns", "tokens"] = "columns"
    rate: float | None = None

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if self.kind not in ("tokens", "columns"):
            raise InputError(f"MC dropout has the kinds 'columns' and 'tokens', and not {self.kind!r}")
        if self.rate is not None and not 0 < self.rate < 1:
            raise InputError(f"MC dropout needs a rate in (0, 1), and it is {self.rate}")

    def check(self, model: nn.Module, task: Task) -> None:
        """Refuse an adapter without dropout, and layers to which the masks do not belong; see `PostHoc.check`."""
        _rate(model, self.rate)
        if self.kind == "columns":
            _check_columns(model)
        else:
            plain_layers(model, "MC dropout by tokens")

    def _fit(self, adapter: TrainedAdapter) -> TokenDropout | ColumnDropout:
        """Return the adapter with its dropout."""
        model, mean, origin = adapter.model, adapter.start.mean, adapter.origin
        if self.kind == "columns":
            return column_dropout(model, mean, origin, self.rate)
        return TokenDropout(mean, _rate(model, self.rate), origin)


def column_dropout(model: nn.Module, mean: Params, origin: Origin | None, rate: float | None = None) -> ColumnDropout:
    """Return the adapters that dropping columns of A makes of one; ``rate`` is None for the model's dropout."""
    _check_columns(model)
    strength = {name: 1.0 for name in mean if name.endswith("lora_A.weight")}
    if not strength:
        raise InputError("dropout draws need LoRA matrices A, and the adapter has none")
    return ColumnDropout(mean, _rate(model, rate), strength, origin)


def _check_columns(model: nn.Module) -> None:
    """Refuse an adapter for which dropping columns of A is not what dropout does."""
    if require_lora(model).active_peft_config.use_dora:
        raise InputError("dropout draws are not weight draws under DoRA; use plain LoRA")


def _rate(model: nn.Module, rate: float | None) -> float:
    """Return the rate that was given, or the adapter's, or refuse."""
    rate = float(require_lora(model).active_peft_config.lora_dropout) if rate is None else rate
    if not rate:
        raise InputError(
            "the adapter was trained without dropout, so MC dropout would change nothing; train with "
            "LoraConfig(lora_dropout=0.1), or pass a rate"
        )
    return rate
