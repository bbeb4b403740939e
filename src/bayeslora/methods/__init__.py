"""The methods, one paper a file, and the table by which the command line and the tests know them."""

from __future__ import annotations

from collections.abc import Callable

from bayeslora.methods.base import Inference, Method, PostHoc
from bayeslora.methods.blob.method import Blob
from bayeslora.methods.divergence import ScaleByDivergence
from bayeslora.methods.ensemble import Ensemble, multi_swag
from bayeslora.methods.isotropic import Isotropic
from bayeslora.methods.ivon.method import Ivon
from bayeslora.methods.laplace.method import Laplace
from bayeslora.methods.map import Map
from bayeslora.methods.mc_dropout import McDropout
from bayeslora.methods.swag import Swag
from bayeslora.methods.temperature import Temperature
from bayeslora.methods.tfb import Tfb

METHODS: dict[str, Callable[..., Inference]] = {
    "map": Map,
    "ensemble": Ensemble,
    "swag": Swag,
    "multiswag": multi_swag,
    "blob": Blob,
    "ivon": Ivon,
    "laplace": Laplace,
    "mc-dropout": McDropout,
    "tfb": Tfb,
    "temperature": Temperature,
    "isotropic": Isotropic,
}
ADJUSTMENTS: dict[str, Callable[..., Inference]] = {"divergence": ScaleByDivergence}
"""What is fitted to a posterior that has noise, and so not to what a Trainer has just trained."""

__all__ = [
    "ADJUSTMENTS",
    "METHODS",
    "Blob",
    "Ensemble",
    "Inference",
    "Isotropic",
    "Ivon",
    "Laplace",
    "Map",
    "McDropout",
    "Method",
    "PostHoc",
    "ScaleByDivergence",
    "Swag",
    "Temperature",
    "Tfb",
    "multi_swag",
]
