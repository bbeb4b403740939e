"""Bayesian LoRA: any PEFT LoRA model, any Hugging Face or TRL Trainer, one method, and a posterior over the adapter.

The names here are loaded when they are used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bayeslora.errors import InputError
from bayeslora.version import __version__

if TYPE_CHECKING:
    from bayeslora.methods import (
        Blob,
        Ensemble,
        Isotropic,
        Ivon,
        Laplace,
        Map,
        McDropout,
        Method,
        PostHoc,
        Swag,
        Temperature,
        Tfb,
        multi_swag,
    )
    from bayeslora.methods.ivon.optimizer import IvonOptimizer
    from bayeslora.metrics.evaluation import Evaluation, evaluate
    from bayeslora.metrics.prediction import Prediction
    from bayeslora.models import load_model
    from bayeslora.posteriors import (
        ColumnDropout,
        DiagonalGaussian,
        Draws,
        KroneckerGaussian,
        Linearised,
        LowRankGaussian,
        Mixture,
        Point,
        Posterior,
        Scaled,
        TokenDropout,
    )
    from bayeslora.posteriors.card import write_card
    from bayeslora.posteriors.hub import push
    from bayeslora.posteriors.loading import export_draws, load_posterior
    from bayeslora.posteriors.transforms import pruned, restricted, tempered
    from bayeslora.prediction import PassOptions, predict
    from bayeslora.prediction.generation import Answer, Answers, by_embedding, by_entailment, generate, generate_each
    from bayeslora.prediction.rewards import penalised_rewards, predict_rewards, preference_probability
    from bayeslora.tasks import load_task
    from bayeslora.training.distillation import distill
    from bayeslora.training.run import fit
    from bayeslora.training.trainer_kwargs import kwargs_for

_HOMES = {
    "metrics.evaluation": ("Evaluation", "evaluate"),
    "prediction.generation": ("Answer", "Answers", "by_embedding", "by_entailment", "generate", "generate_each"),
    "training.distillation": ("distill",),
    "training.run": ("fit",),
    "methods": (
        "Blob",
        "Ensemble",
        "Isotropic",
        "Ivon",
        "Laplace",
        "Map",
        "McDropout",
        "Method",
        "PostHoc",
        "Swag",
        "Temperature",
        "Tfb",
        "multi_swag",
    ),
    "models": ("load_model",),
    "posteriors.transforms": ("pruned", "restricted", "tempered"),
    "methods.ivon.optimizer": ("IvonOptimizer",),
    "posteriors": (
        "ColumnDropout",
        "DiagonalGaussian",
        "Draws",
        "KroneckerGaussian",
        "Linearised",
        "LowRankGaussian",
        "Mixture",
        "Point",
        "Posterior",
        "Scaled",
        "TokenDropout",
    ),
    "prediction": ("PassOptions", "predict"),
    "metrics.prediction": ("Prediction",),
    "prediction.rewards": ("penalised_rewards", "predict_rewards", "preference_probability"),
    "training.trainer_kwargs": ("kwargs_for",),
    "posteriors.hub": ("push",),
    "posteriors.card": ("write_card",),
    "posteriors.loading": ("export_draws", "load_posterior"),
    "tasks": ("load_task",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Answer",
    "Answers",
    "Blob",
    "ColumnDropout",
    "DiagonalGaussian",
    "Draws",
    "Ensemble",
    "Evaluation",
    "InputError",
    "Isotropic",
    "Ivon",
    "IvonOptimizer",
    "KroneckerGaussian",
    "Laplace",
    "Linearised",
    "LowRankGaussian",
    "Map",
    "McDropout",
    "Method",
    "Mixture",
    "PassOptions",
    "Point",
    "PostHoc",
    "Posterior",
    "Prediction",
    "Scaled",
    "Swag",
    "Temperature",
    "Tfb",
    "TokenDropout",
    "__version__",
    "by_embedding",
    "by_entailment",
    "distill",
    "evaluate",
    "export_draws",
    "fit",
    "generate",
    "generate_each",
    "kwargs_for",
    "load_model",
    "load_posterior",
    "load_task",
    "multi_swag",
    "penalised_rewards",
    "predict",
    "predict_rewards",
    "preference_probability",
    "pruned",
    "push",
    "restricted",
    "tempered",
    "write_card",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bayeslora' has no attribute {name!r}")
    value = getattr(import_module(f"bayeslora.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
