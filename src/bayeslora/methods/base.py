"""What a method is: hyper-parameters, what to hand to a Trainer, and the posterior afterwards.

Some methods need nothing but an adapter that is trained: they are fitted to it afterwards. A method never subclasses a
Trainer. What has to be remembered between training and `posterior` is kept per model, weakly, so that it goes when the
model goes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, fields, is_dataclass
from typing import Any, ClassVar, cast, final

from torch import nn

from bayeslora.errors import InputError
from bayeslora.methods.records import Recorder, check_num_data, recall
from bayeslora.params import Params, read
from bayeslora.posteriors import Posterior
from bayeslora.posteriors.provenance import Origin, check_scores, origin_of, scored
from bayeslora.tasks.types import Task


class Method(ABC):
    """A way to learn a posterior while a Trainer trains.

    Attributes:
        name: The method's name on the command line and on disk.
    """

    name: ClassVar[str]

    @abstractmethod
    def trainer_kwargs(self, model: nn.Module, num_data: int) -> dict[str, Any]:
        """Return what to splat into any Hugging Face or TRL Trainer.

        Args:
            model: The model that the Trainer will train.
            num_data: Number of training examples N.

        Returns:
            Keyword arguments of the Trainer: ``callbacks``, and ``compute_loss_func`` where the method changes the
            loss.
        """

    @abstractmethod
    def posterior(self, model: nn.Module) -> Posterior:
        """Return what was learned, after ``trainer.train()``.

        Args:
            model: The model that was trained (``trainer.model``).

        Returns:
            The posterior over its active adapter.
        """


class PostHoc(Method):
    """A way to make a posterior of an adapter that is trained already, by any means."""

    @abstractmethod
    def check(self, model: nn.Module, task: Task) -> None:
        """Refuse what `fit` would refuse, as far as it can be told before the adapter is trained.

        Args:
            model: PEFT model.
            task: The task.

        Raises:
            InputError: If the model or the task's rows do not serve.
        """

    @abstractmethod
    def fit(
        self,
        model: nn.Module,
        task: Task,
        *,
        start: Posterior | None = None,
        tokenizer: Any = None,
        seed: int = 0,
        token_budget: int | None = None,
    ) -> Posterior:
        """Return the posterior around an adapter that is trained.

        Args:
            model: PEFT model; its adapter is what is fitted unless ``start`` is given, and stays as it is.
            task: The task: ``train`` is what the adapter was trained on, ``validation`` what settings are chosen on.
            start: The adapter to fit instead, as the mean of a posterior.
            tokenizer: The model's tokenizer; None loads the one that was saved with the model.
            seed: Which stream of random numbers.
            token_budget: Most tokens of a batch; None for what fits.

        Returns:
            The posterior.

        Raises:
            InputError: If the task lacks the rows that the method needs, or the fit fails.
        """

    @final
    def trainer_kwargs(self, model: nn.Module, num_data: int) -> dict[str, Any]:
        """Return a callback that notes the run; training is plain."""
        return {"callbacks": [Recorder(self.name, check_num_data(num_data))]}

    @final
    def posterior(self, model: nn.Module) -> Posterior:
        """Refuse: the fit needs the data.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"{self.name} is fitted after training, on the task's rows: call method.fit(model, task), or bayeslora.fit"
        )


def fit_start(model: nn.Module, method: PostHoc, task: Task, start: Posterior | None) -> tuple[Params, Origin]:
    """Return the adapter that a method is fitted to, and the origin of its posterior.

    Args:
        model: PEFT model.
        method: The method.
        task: The task.
        start: A posterior whose mean is the adapter; None for the model's own.

    Returns:
        The adapter's parameters, and the origin with the number of the task's training examples.
    """
    origin = origin_for(model, method, None if task.train is None else len(task.train))
    check_scores(None if start is None else start.origin, task.normalisation, f"the task {task.name}")
    return read(model) if start is None else start.mean, scored(origin, task.normalisation)


def settings(method: Method) -> dict[str, Any]:
    """Return a method's hyper-parameters, ready for JSON.

    Args:
        method: A method.

    Returns:
        Field name to value; a method inside (an ensemble's member) as an object with its own ``name``.
    """
    found: dict[str, Any] = {}
    for f in fields(cast(Any, method)):
        value = getattr(method, f.name)
        if isinstance(value, Method):
            found[f.name] = {"name": value.name, **settings(value)}
        else:
            found[f.name] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    return found


def origin_for(model: nn.Module, method: Method, num_data: int | None = None) -> Origin:
    """Return the origin of the posterior that a method learned on a model.

    Args:
        model: The model that was trained.
        method: The method.
        num_data: Number of training examples; None for that of the run on record, if there is one.

    Returns:
        The origin.
    """
    record = recall(model, method.name)
    known = record.num_data if record is not None and num_data is None else num_data
    return origin_of(model, method.name, settings(method), known)
