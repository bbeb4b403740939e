"""Every method that there is, small enough for the suite: a newcomer to `METHODS` is tested unasked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from bayeslora.methods import METHODS, Blob, Ensemble, Inference, Ivon, Laplace, Map, PostHoc, Swag, Temperature
from support.tiny import KINDS

DROPOUT = 0.1
"""LoRA dropout of the models that the methods train."""

QUICK = {"ensemble": {"members": 2}, "multiswag": {"members": 2}}
"""Settings that make a method of the table quick; a method without an entry is tested as it comes."""

TABLE: dict[str, Inference] = {name: make(**QUICK.get(name, {})) for name, make in METHODS.items()} | {
    "map-decay": Map(weight_decay=0.1, weight_decay_b=5.0),
    "map-kl": Map(kl=0.1),
    "ensemble-dropout": Ensemble(2, Map(weight_decay_b=5.0), dropout_draws=True),
    "swag-diagonal": Swag("diagonal", start=2, interval=1, learning_rate=3e-3),
    "swag-swa": Swag("swa"),
    "blob-elbo": Blob("elbo", prior_sigma=0.1, kl_cycle=3),
    "ensemble-blob": Ensemble(2, Blob()),
    "ivon-published": Ivon(preset="arc_easy"),
    "ivon-empirical": Ivon(sigma0=0.05, max_step=1e-2, temperature=0.1, prior="empirical"),
    "ensemble-ivon": Ensemble(2, Ivon()),
    "laplace-diagonal": Laplace("diag", predictive="draws"),
    "ensemble-laplace": Ensemble(2, Laplace(last_layers=1, prior="marginal")),
    "temperature-vector": Temperature("vector"),
}

EVERYTHING = ("llama-likelihood",)
"""Kinds of models on which every method is tested."""

DIFFERENT = ("ensemble-dropout", "ivon", "blob", "laplace")
"""The methods that differ most, which are tested on every kind."""

MAIN = ("map", "swag", "ensemble", "ivon", "blob", "laplace")
"""The methods that the quick part of the suite tries beyond the plain Trainer and base."""

REPEATS = (
    *("ensemble-blob", "ensemble-ivon", "ensemble-laplace", "ivon-published", "map-decay", "swag-swa", "multiswag"),
    *(name for name, method in TABLE.items() if isinstance(method, PostHoc)),
)
"""Methods that train by the same code as others here; what takes another training run is tested on those."""

PAIRS = [
    (method, kind)
    for kind in KINDS
    for method in TABLE
    if (kind in EVERYTHING or method in DIFFERENT) and not (method == "temperature-vector" and kind != "bert")
] + [("temperature-vector", "bert")]
"""Methods by models."""


def quick_if_main(names: Iterable[str], *more: str) -> list[Any]:
    """Rows of a table of methods beyond the plain Trainer and base: only the main methods' are for the quick part.

    Args:
        names: The methods.
        *more: What else each row has.
    """
    return [pytest.param(name, *more, marks=() if name in MAIN else pytest.mark.slow) for name in names]
