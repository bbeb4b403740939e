"""The base classes of methods: `Method` learns while a Trainer trains, `PostHoc` is fitted to a trained adapter."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, ClassVar, Generic, TypeVar, final

from torch import nn

from bayeslora._typing import Tokenizer
from bayeslora.errors import InputError
from bayeslora.methods.records import Recorder, recall
from bayeslora.methods.steps import guarded
from bayeslora.metrics.classification import nll
from bayeslora.metrics.prediction import Prediction
from bayeslora.params import Params, check_finite, read
from bayeslora.posteriors import Draws, Point, Posterior
from bayeslora.posteriors.provenance import Origin, check_scores, origin_of, scored
from bayeslora.prediction import PassOptions, predict
from bayeslora.tasks.types import Split, Task

LATER = {"later": True}
"""Metadata of a setting with whose default a method is what it was before it came: see `training.keys.of_method`."""
TrainerKwargs = dict[str, Any]
"""What is splatted into a Trainer: ``callbacks``, and more where a method changes the loss or the optimiser."""


class Inference(ABC):
    """A way to learn a posterior, with its settings: during training (`Method`) or after it (`PostHoc`).

    Attributes:
        name: The name on the command line and on disk.
    """

    name: ClassVar[str]

    @abstractmethod
    def trainer_kwargs(self, model: nn.Module, num_data: int) -> TrainerKwargs:
        """Return what to splat into any Hugging Face or TRL Trainer.

        Args:
            model: The model that the Trainer will train.
            num_data: Number of training examples N.

        Returns:
            Keyword arguments of the Trainer: ``callbacks``, and ``compute_loss_func`` where the method changes the
            loss.
        """


class Method(Inference):
    """A way to learn a posterior while a Trainer trains."""

    @abstractmethod
    def posterior(self, model: nn.Module) -> Posterior:
        """Return what was learned, after ``trainer.train()``.

        Args:
            model: The model that was trained (``trainer.model``).

        Returns:
            The posterior over its active adapter.

        Raises:
            InputError: If the model was not trained with the method.
        """

    @property
    def stages(self) -> tuple[Method, PostHoc[Posterior] | None]:
        """What a Trainer trains, and what is then fitted to its posterior on the task's rows: itself, and nothing."""
        return self, None


@dataclass(frozen=True)
class TrainedAdapter:
    """What a method is fitted to: the mean of ``start``, on a model and its task, and what `predict` is given."""

    model: nn.Module
    task: Task
    start: Posterior
    origin: Origin
    tokenizer: Tokenizer | None
    seed: int
    token_budget: int | None
    progress: bool = False

    def predict(
        self, posterior: Posterior, rows: Split, draws: int, *, mean: bool = True, base: bool = False
    ) -> Prediction:
        """Return what a posterior says about rows, also by its mean; all posteriors by the same stream of draws."""
        return predict(
            self.model, posterior, rows, Draws(draws, self.seed), mean=mean, base=base, tokenizer=self.tokenizer,
            token_budget=self.token_budget, options=PassOptions(progress=self.progress),
        )  # fmt: skip

    def nll(self, posterior: Posterior, rows: Split, draws: int) -> float:
        """Return the negative log-likelihood of the draws' mean probabilities, nats a row; infinite if not finite."""
        return float(nll(self.predict(posterior, rows, draws).log_p, rows.labels))


Fitted = TypeVar("Fitted", bound=Posterior, covariant=True)


class PostHoc(Inference, Generic[Fitted]):
    """A way to make a posterior of an adapter that is trained already, by any means."""

    @final
    def trainer_kwargs(self, model: nn.Module, num_data: int) -> TrainerKwargs:
        """Return a callback that notes the run; training is plain."""
        return {"callbacks": guarded([Recorder(self.name, num_data)])}

    @abstractmethod
    def check(self, model: nn.Module, task: Task) -> None:
        """Refuse what `fit` would refuse, as far as it can be told before the adapter is trained.

        Args:
            model: PEFT model.
            task: The task.

        Raises:
            InputError: If the model or the task's rows do not serve.
        """

    @final
    def fit(
        self,
        model: nn.Module,
        task: Task,
        *,
        start: Posterior | None = None,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
        token_budget: int | None = None,
        progress: bool = True,
    ) -> Fitted:
        """Return the posterior around an adapter that is trained.

        Args:
            model: PEFT model; its adapter is what is fitted unless ``start`` is given, and stays as it is.
            task: The task: ``train`` is what the adapter was trained on, ``validation`` what settings are chosen on.
            start: The adapter to fit instead, as the mean of a posterior.
            tokenizer: The model's tokenizer; None loads the one that was saved with the model.
            seed: Which stream of random numbers.
            token_budget: Most tokens of a batch; None for what fits.
            progress: Whether bars with the time left are shown, as the Trainer shows one.

        Returns:
            The posterior.

        Raises:
            InputError: If the task lacks the rows that the method needs, or the fit fails.
        """
        self.check(model, task)
        origin = origin_for(model, self, None if task.train is None else len(task.train))
        check_scores(None if start is None else start.origin, task.normalisation, f"the task {task.name}")
        origin = scored(origin, task.normalisation)
        posterior = Point(trained(model), origin) if start is None else start
        return self._fit(TrainedAdapter(model, task, posterior, origin, tokenizer, seed, token_budget, progress))

    @abstractmethod
    def _fit(self, adapter: TrainedAdapter) -> Fitted:
        """Return the posterior around an adapter, once `check` has passed."""


def trained(model: nn.Module) -> Params:
    """Return a copy of the trained adapter, float32 on the CPU, or refuse one with numbers that are not finite."""
    params = read(model)
    check_finite(params, "the trained adapter makes no posterior")
    return params


def settings(method: Inference) -> dict[str, object]:
    """Return the hyper-parameters, ready for JSON; a method inside (an ensemble's member) has its own ``name``."""
    assert is_dataclass(method)
    values: dict[str, object] = asdict(method)
    for key in values:
        inner = getattr(method, key)
        if isinstance(inner, Inference):
            values[key] = {"name": inner.name, **settings(inner)}
    return values


def check_ranges(
    method: Inference,
    *,
    prefix: str = "",
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    infinite: Sequence[str] = (),  # which of these may be
    at_least: Mapping[str, int] | None = None,
) -> None:
    """Refuse settings, by name, that are given and out of range, and begin the messages with ``prefix``."""
    for key in (*positive, *not_negative):
        value = getattr(method, key)
        if value is None or (value == math.inf and key in infinite):
            continue
        if not (0 < value < math.inf or (value == 0 and key in not_negative)):
            words = "not negative" if key in not_negative else "positive"
            raise InputError(f"{prefix}{key} must be finite and {words}, and it is {value}")
    for key, least in (at_least or {}).items():
        value = getattr(method, key)
        if value is not None and value < least:
            raise InputError(f"{prefix}{key} must be at least {least}, and it is {value}")


def origin_for(model: nn.Module, method: Inference, num_data: int | None = None) -> Origin:
    """Return the origin of the posterior that was learned on a model; ``num_data`` is None for the recorded run's."""
    record = recall(model, method.name)
    known = record.num_data if record is not None and num_data is None else num_data
    return origin_of(model, method.name, settings(method), known)
