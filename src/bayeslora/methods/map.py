"""Maximum a posteriori: the point estimate that every Bayesian method is compared with, and an ensemble's member.

Loss per example: CE + β·KL(p_θ(·|x) ‖ p_base(·|x)), and decoupled weight decay θ ← θ − η·λ·θ at each optimiser step, on
all of the adapter or on B alone (B = 0 is the pre-trained model). Both regularisers are those of Wang, Aitchison and
Rudolph 2023 (arXiv 2310.00035, §3); zero gives the plain AdamW fine-tune.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from bayeslora.errors import InputError
from bayeslora.methods.base import Method, TrainerKwargs, check_ranges, origin_for, trained
from bayeslora.methods.records import Recorder
from bayeslora.methods.regularisers import DecoupledDecay, KlToBase
from bayeslora.methods.steps import guarded
from bayeslora.posteriors import Point


@final
@dataclass(frozen=True)
class Map(Method):
    """A point estimate.

    Attributes:
        weight_decay: Decoupled decay λ on all adapter parameters, on top of the Trainer's own ``weight_decay``.
        weight_decay_b: Decoupled decay on B alone, typically very large; learning rate × decay must stay below 1.
        kl: Weight β of the KL divergence from the base model's answers; costs one more forward pass.
        early_stopping: Stop after so many evaluations without improvement and keep the best adapter; None: never. The
            Trainer needs ``load_best_model_at_end=True`` and an evaluation set.
    """

    name: ClassVar[str] = "map"
    weight_decay: float = 0.0
    weight_decay_b: float = 0.0
    kl: float = 0.0
    early_stopping: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        check_ranges(self, not_negative=("weight_decay", "weight_decay_b", "kl"), at_least={"early_stopping": 1})

    def trainer_kwargs(self, model: nn.Module, num_data: int) -> TrainerKwargs:
        """Return the callbacks, and the loss if there is a KL term."""
        callbacks: list[TrainerCallback] = [Recorder(self.name, num_data)]
        kwargs: TrainerKwargs = {}
        if self.weight_decay or self.weight_decay_b:
            callbacks.append(DecoupledDecay(self.weight_decay, self.weight_decay_b))
        if self.early_stopping is not None:
            callbacks += [_NeedsEvaluation(), EarlyStoppingCallback(self.early_stopping)]
        if self.kl:
            divergence = KlToBase(self.kl)
            callbacks.append(divergence)
            kwargs["compute_loss_func"] = divergence.loss
        return {**kwargs, "callbacks": guarded(callbacks)}

    def posterior(self, model: nn.Module) -> Point:
        """Return the model's adapter as it is."""
        return Point(trained(model), origin_for(model, self))


@final
class _NeedsEvaluation(TrainerCallback):
    """Says in words what early stopping needs of the Trainer."""

    def on_train_begin(self, args: TrainingArguments, state: object, control: object, **_: object) -> None:
        """Refuse arguments with which nothing would be evaluated or restored."""
        if not args.load_best_model_at_end or args.metric_for_best_model is None:
            raise InputError(
                "early stopping needs TrainingArguments(load_best_model_at_end=True, "
                "metric_for_best_model='eval_loss', eval_strategy='epoch', save_strategy='epoch') and an eval_dataset"
            )
