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

from bayeslora.errors import InputError as InputError
from bayeslora.version import __version__ as __version__

if TYPE_CHECKING:  # ``as`` says that a name is for others to import
    from bayeslora.methods import Blob as Blob
    from bayeslora.methods import Ensemble as Ensemble
    from bayeslora.methods import Isotropic as Isotropic
    from bayeslora.methods import Ivon as Ivon
    from bayeslora.methods import Laplace as Laplace
    from bayeslora.methods import Map as Map
    from bayeslora.methods import McDropout as McDropout
    from bayeslora.methods import Method as Method
    from bayeslora.methods import PostHoc as PostHoc
    from bayeslora.methods import ScaleByDivergence as ScaleByDivergence
    from bayeslora.methods import Swag as Swag
    from bayeslora.methods import Temperature as Temperature
    from bayeslora.methods import Tfb as Tfb
    from bayeslora.methods import multi_swag as multi_swag
    from bayeslora.methods.checkpoints import last_checkpoint as last_checkpoint
    from bayeslora.methods.ivon.optimizer import IvonOptimizer as IvonOptimizer
    from bayeslora.methods.steps import FiniteSteps as FiniteSteps
    from bayeslora.metrics.evaluation import Evaluation as Evaluation
    from bayeslora.metrics.evaluation import evaluate as evaluate
    from bayeslora.metrics.prediction import Prediction as Prediction
    from bayeslora.models import load_model as load_model
    from bayeslora.posteriors import ColumnDropout as ColumnDropout
    from bayeslora.posteriors import DiagonalGaussian as DiagonalGaussian
    from bayeslora.posteriors import Draws as Draws
    from bayeslora.posteriors import KroneckerGaussian as KroneckerGaussian
    from bayeslora.posteriors import Linearised as Linearised
    from bayeslora.posteriors import LowRankGaussian as LowRankGaussian
    from bayeslora.posteriors import Mixture as Mixture
    from bayeslora.posteriors import Point as Point
    from bayeslora.posteriors import Posterior as Posterior
    from bayeslora.posteriors import Scaled as Scaled
    from bayeslora.posteriors import TokenDropout as TokenDropout
    from bayeslora.posteriors.card import write_card as write_card
    from bayeslora.posteriors.hub import push as push
    from bayeslora.posteriors.loading import export_draws as export_draws
    from bayeslora.posteriors.loading import load_posterior as load_posterior
    from bayeslora.posteriors.transforms import pruned as pruned
    from bayeslora.posteriors.transforms import restricted as restricted
    from bayeslora.posteriors.transforms import tempered as tempered
    from bayeslora.prediction import PassOptions as PassOptions
    from bayeslora.prediction import predict as predict
    from bayeslora.prediction.generation import Answer as Answer
    from bayeslora.prediction.generation import Answers as Answers
    from bayeslora.prediction.generation import by_embedding as by_embedding
    from bayeslora.prediction.generation import by_entailment as by_entailment
    from bayeslora.prediction.generation import generate as generate
    from bayeslora.prediction.generation import generate_each as generate_each
    from bayeslora.prediction.prompts import prompt_likelihood_ratio as prompt_likelihood_ratio
    from bayeslora.prediction.rewards import penalised_rewards as penalised_rewards
    from bayeslora.prediction.rewards import predict_rewards as predict_rewards
    from bayeslora.prediction.rewards import preference_probability as preference_probability
    from bayeslora.processes import sharded as sharded
    from bayeslora.tasks import load_task as load_task
    from bayeslora.training.distillation import distill as distill
    from bayeslora.training.run import fit as fit
    from bayeslora.training.stopping import TimedCheckpoints as TimedCheckpoints
    from bayeslora.training.trainer_kwargs import kwargs_for as kwargs_for

_HOMES = {
    "methods": (
        "Blob Ensemble Isotropic Ivon Laplace Map McDropout Method PostHoc ScaleByDivergence Swag Temperature Tfb "
        "multi_swag"
    ),
    "methods.checkpoints": "last_checkpoint",
    "methods.ivon.optimizer": "IvonOptimizer",
    "methods.steps": "FiniteSteps",
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
    "prediction.prompts": "prompt_likelihood_ratio",
    "prediction.rewards": "penalised_rewards predict_rewards preference_probability",
    "processes": "sharded",
    "tasks": "load_task",
    "training.distillation": "distill",
    "training.run": "fit",
    "training.stopping": "TimedCheckpoints",
    "training.trainer_kwargs": "kwargs_for",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted([*_HOME, "InputError", "__version__"])


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
