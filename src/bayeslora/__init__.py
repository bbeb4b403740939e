"""Bayesian LoRA: any PEFT LoRA model, any Hugging Face or TRL Trainer, one method, and a posterior over the adapter.

Public names are imported when they are first used: ``import bayeslora`` takes milliseconds, torch seconds.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING
from warnings import warn

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
    "methods": "Blob Ensemble Isotropic Ivon Laplace Map McDropout Method PostHoc Swag Temperature Tfb multi_swag",
    "methods.ivon.optimizer": "IvonOptimizer",
    "metrics.evaluation": "Evaluation evaluate",
    "metrics.prediction": "Prediction",
    "models": "load_model",
    "posteriors": (
        "ColumnDropout DiagonalGaussian Draws KroneckerGaussian Linearised LowRankGaussian Mixture Point Posterior "
        "Scaled TokenDropout"
    ),
    "posteriors.card": "write_card",
    "posteriors.hub": "push",
    "posteriors.loading": "export_draws load_posterior",
    "posteriors.transforms": "pruned restricted tempered",
    "prediction": "PassOptions predict",
    "prediction.generation": "Answer Answers by_embedding by_entailment generate generate_each",
    "prediction.rewards": "penalised_rewards predict_rewards preference_probability",
    "tasks": "load_task",
    "training.distillation": "distill",
    "training.run": "fit",
    "training.trainer_kwargs": "kwargs_for",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

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


if not TYPE_CHECKING:  # a type checker must know an unknown name as one

    def __getattr__(name):
        """Import a public name when it is first used."""
        if name not in _HOME:
            raise AttributeError(f"module 'bayeslora' has no attribute {name!r}")
        value = getattr(import_module(f"bayeslora.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__


# Modules that moved after version 0.1: the former paths work for one release, with a warning.
_MOVED = {
    "card": "posteriors.card",
    "demo_model": "cli.demo.model",
    "distillation": "training.distillation",
    "engine": "prediction",
    "evaluation": "metrics.evaluation",
    "generation": "prediction.generation",
    "hub": "posteriors.hub",
    "integrations.samples": "integrations.lm_eval_calibration",
    "integrations.vllm": "integrations.openai.client",
    "methods.trainers": "training.trainer_kwargs",
    "operations": "posteriors.transforms",
    "optim": "methods.ivon.optimizer",
    "origin": "posteriors.provenance",
    "rewards": "prediction.rewards",
    "serve": "integrations.server",
    "serve.worker": "integrations.server.worker",
    "storage": "posteriors.loading",
    "tasks.chance": "tasks.synthetic",
}


class _MovedModules:
    """Import a module that moved under its former path too; both paths give the same module."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return a spec for a former path, None for every other module."""
        package, _, name = fullname.partition(".")
        if package != "bayeslora" or name not in _MOVED:
            return None
        warn(f"{fullname} has moved; import bayeslora.{_MOVED[name]}", DeprecationWarning, stacklevel=2)
        return ModuleSpec(fullname, self)  # type: ignore[arg-type]  # importlib.abc.Loader takes 12 ms to import

    def create_module(self, spec: ModuleSpec) -> None:
        """Let Python make the placeholder that `exec_module` replaces."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of today in the place of the placeholder."""
        former = module.__name__
        sys.modules[former] = import_module(f"bayeslora.{_MOVED[former.partition('.')[2]]}")


# Ahead of Python's own finders, which would load a submodule of a moved package a second time.
sys.meta_path.insert(0, _MovedModules())
