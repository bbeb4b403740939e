"""One row for each method and what the suite tests it on; a newcomer to `METHODS` is tested unasked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from bayeslora.methods import (
    METHODS,
    Blob,
    Ensemble,
    Inference,
    Isotropic,
    Ivon,
    Laplace,
    Map,
    McDropout,
    PostHoc,
    Swag,
    Temperature,
    Tfb,
    multi_swag,
)
from support.tiny import KINDS

DROPOUT = 0.1
"""LoRA dropout of the models that the methods train."""

LM, HEAD = "llama-likelihood", "bert"
"""The kind of model on which every method is tested, and the one that differs most from it."""


@dataclass(frozen=True)
class Row:
    """A method under its name in the table, and where the suite tests it."""

    name: str
    method: Inference
    kinds: tuple[str, ...] = (LM,)
    """Kinds of models on which it is trained, once for the whole suite."""
    retrained: tuple[str, ...] = (LM,)
    """Kinds on which it is trained again, for facts about training; none where another row trains by the same code."""
    quick: bool = False
    """Whether the quick part of the suite tries it in foreign trainers and on quantised bases too."""
    packed: bool = False
    """Whether it is tried on packed rows."""
    own_loss: bool = False
    """Whether it needs a loss function that the trainer calls."""

    @property
    def post_hoc(self) -> bool:
        """Whether the method is fitted to a trained adapter and so does not learn in a Trainer."""
        return isinstance(getattr(self.method, "member", self.method), PostHoc)

    def param(self, *more: str) -> Any:
        """A parameter of tests beyond the plain Trainer and base: slow unless the row is `quick`."""
        return pytest.param(self.name, *more, marks=() if self.quick else pytest.mark.slow)


EVERY_KIND = tuple(KINDS)

ROWS = (
    Row("map", Map(), retrained=(LM, HEAD), quick=True, packed=True),
    Row("map-decay", Map(weight_decay=0.1, weight_decay_b=5.0), retrained=()),
    Row("map-kl", Map(kl=0.1), packed=True, own_loss=True),
    Row("ensemble", Ensemble(2), retrained=(LM, HEAD), quick=True, packed=True),
    Row("ensemble-dropout", Ensemble(2, Map(weight_decay_b=5.0), dropout_draws=True), kinds=EVERY_KIND),
    Row("swag", Swag(), retrained=(LM, HEAD), quick=True, packed=True),
    Row("swag-diagonal", Swag("diagonal", start=2, interval=1, learning_rate=3e-3)),
    Row("swag-swa", Swag("swa"), retrained=()),
    Row("multiswag", multi_swag(2), retrained=()),
    Row("blob", Blob(), kinds=EVERY_KIND, retrained=(LM, HEAD), quick=True, packed=True),
    Row("blob-elbo", Blob("elbo", prior_sigma=0.1, kl_cycle=3), packed=True),
    Row("ensemble-blob", Ensemble(2, Blob()), retrained=()),
    Row("ivon", Ivon(), kinds=EVERY_KIND, retrained=(LM, HEAD), quick=True, packed=True),
    Row("ivon-published", Ivon(preset="arc_easy"), retrained=()),
    Row("ivon-empirical", Ivon(sigma0=0.05, max_step=1e-2, temperature=0.1, prior="empirical")),
    Row("ensemble-ivon", Ensemble(2, Ivon()), retrained=()),
    Row("laplace", Laplace(), kinds=EVERY_KIND, quick=True),
    Row("laplace-diagonal", Laplace("diag", predictive="draws")),
    Row("ensemble-laplace", Ensemble(2, Laplace(last_layers=1, prior="marginal"))),
    Row("mc-dropout", McDropout()),
    Row("tfb", Tfb()),
    Row("isotropic", Isotropic()),
    Row("isotropic-divergence", Isotropic(scale="divergence", divergence=1e-4)),
    Row("temperature", Temperature()),
    Row("temperature-vector", Temperature("vector"), kinds=(HEAD,)),
    Row("temperature-free", Temperature(labels=False)),
)

TABLE: dict[str, Row] = {row.name: row for row in ROWS}
# a newcomer is tested before it has a row
TABLE |= {name: Row(name, make()) for name, make in METHODS.items() if name not in TABLE}

LEARNERS = [row for row in TABLE.values() if not row.post_hoc]
"""Methods that learn while a Trainer trains."""

PAIRS = [(row.name, kind) for kind in KINDS for row in TABLE.values() if kind in row.kinds]
"""Methods by models."""
