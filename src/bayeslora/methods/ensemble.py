"""LoRA ensembles: several adapters of one base model, each from its own start on its own order of the data.

Wang, Aitchison and Rudolph 2023 (arXiv 2310.00035). The prediction is the mean of the members' probabilities. The
member is any method: `Map` gives the paper's ensembles (its KL term and its decay of B are the paper's regularisers),
`Swag` gives MultiSWAG, and so on. With ``dropout_draws`` a member is not one adapter but all those that its dropout
makes.

What we do differently from published code elsewhere: members differ in start *and* data order, probabilities rather
than logits are averaged, and the mutual information is taken over members before they are averaged.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, final

from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from bayeslora.errors import InputError
from bayeslora.methods.base import Inference, Method, PostHoc, TrainerKwargs, origin_for
from bayeslora.methods.checkpoints import seed_of_checkpoint
from bayeslora.methods.map import Map
from bayeslora.methods.mc_dropout import column_dropout
from bayeslora.methods.records import Record, check_num_data, recall, remember, require_record
from bayeslora.methods.steps import guarded
from bayeslora.methods.swag import Swag
from bayeslora.params import initialise, require_lora, seed_of
from bayeslora.posteriors import Mixture, Posterior


@final
@dataclass(frozen=True)
class Ensemble(Method):
    """An equal mixture of several runs of a method.

    With a Trainer of one's own, train once per member with that member's arguments, and ask for the posterior last:

        for member in range(method.members):
            args = method.member_arguments(arguments, member)
            Trainer(model, args, ..., **method.trainer_kwargs(model, num_data)).train()
        posterior = method.posterior(model)

    Attributes:
        members: Number M of runs.
        member: The method of each run.
        dropout_draws: Whether each member's draws drop columns of A, at the adapter's dropout rate.
        together: Whether `bayeslora.fit` trains all members in one pass over the base, side by side: what separate runs
            give up to rounding (with dropout: with other masks), at M times the rows of a batch. For plain members.
    """

    name: ClassVar[str] = "ensemble"
    members: int = 5
    member: Inference = field(default_factory=Map)
    dropout_draws: bool = False
    together: bool = False

    def __post_init__(self) -> None:
        """Refuse an empty ensemble, one inside another, and options that the members' method does not serve."""
        if self.members < 1:
            raise InputError(f"an ensemble needs at least 1 member, and it has {self.members}")
        if isinstance(self.member, Ensemble):
            raise InputError("the members of an ensemble cannot be ensembles; multiply the number of members instead")
        if self.dropout_draws and not isinstance(self.member, Map):
            raise InputError(f"dropout draws need members that are points, and these are {self.member.name}; use Map()")
        if self.together and not isinstance(self.member, Map):
            raise InputError(f"members that are trained together must be points, and these are {self.member.name}")
        if self.together and isinstance(self.member, Map) and self.member.early_stopping is not None:
            raise InputError("members that are trained together cannot stop early, each at its time")

    def member_arguments(self, args: TrainingArguments, member: int) -> TrainingArguments:
        """Return the Trainer's arguments for one member: its own seed, data order and output folder.

        Args:
            args: Arguments for the whole.
            member: Number of the member, from 0; member 0 has the seed of ``args``, the others see `member_seed`.

        Returns:
            A changed copy.
        """
        changed = seeded(args, member)
        changed.output_dir = str(Path(args.output_dir) / f"member-{member}")
        return changed

    def trainer_kwargs(self, model: nn.Module, num_data: int) -> TrainerKwargs:
        """Return the member's arguments, with the callbacks that give it its start and keep its posterior."""
        check_num_data(num_data)
        if self.together:
            raise InputError("members are trained together by bayeslora.fit only; use together=False")
        if isinstance(self.member, PostHoc):
            raise InputError(
                f"the members' method, {self.member.name}, is fitted after training: use bayeslora.fit, or fit each "
                "trained member and put them together with method.mixture(members, model)"
            )
        kwargs = self.member.trainer_kwargs(model, num_data)
        return {**kwargs, "callbacks": guarded([_Start(self, num_data), *kwargs["callbacks"], _Keep(self)])}

    def posterior(self, model: nn.Module) -> Mixture:
        """Return the mixture of the members that were trained; see `Method.posterior`."""
        by_seed: dict[int, Posterior] = require_record(model, self.name).learned
        if len(by_seed) < self.members:
            raise InputError(
                f"{len(by_seed)} of the ensemble's {self.members} members are trained; call trainer.train() for each, "
                "with method.member_arguments(args, member)"
            )
        return self.mixture(_in_order(by_seed)[: self.members], model)

    def mixture(self, members: list[Posterior], model: nn.Module) -> Mixture:
        """Return the ensemble of members that were trained one by one.

        Args:
            members: The members' posteriors, first member first.
            model: The model, for the origin and the dropout rate.

        Returns:
            The mixture.
        """
        if self.dropout_draws:
            members = [column_dropout(model, m.mean, m.origin) for m in members]
        return Mixture(tuple(members), origin_for(model, self))


def multi_swag(members: int = 3, **settings: Any) -> Ensemble:
    """Return MultiSWAG: several SWAG runs, all their draws averaged (Wilson and Izmailov 2020, arXiv 2002.08791).

    Args:
        members: Number of runs.
        **settings: Settings of `Swag`.

    Returns:
        An ensemble of `Swag`.
    """
    return Ensemble(members, Swag(**settings))


def member_seed(seed: int, member: int) -> int:
    """Return the seed of an ensemble's member: its start and its order of the data.

    It is the ensemble's for member 0, else a hash of both from 2³⁰ to 2³¹ − 1, where no one numbers seeds by hand: so
    ensembles of different seeds share no member, and can be compared as independent repetitions.
    """
    return seed if member == 0 else 2**30 + seed_of("member", seed, member) % 2**30


def seeded(args: TrainingArguments, member: int) -> TrainingArguments:
    """Return a copy of the Trainer's arguments, which have the ensemble's seeds, with those of a member."""
    changed = copy.copy(args)
    changed.seed = member_seed(args.seed, member)
    changed.data_seed = None if args.data_seed is None else member_seed(args.data_seed, member)
    return changed


def _in_order(by_seed: Mapping[int, Posterior]) -> list[Posterior]:
    """Return posteriors by the numbers that their seeds stand for; with other seeds, as they were trained."""
    for seed in by_seed:  # one of them is the ensemble's own, member 0's
        seeds = [member_seed(seed, k) for k in range(len(by_seed))]
        if by_seed.keys() == set(seeds):
            return [by_seed[each] for each in seeds]
    return list(by_seed.values())


@final
class _Start(TrainerCallback):
    """Gives a run its own start."""

    def __init__(self, ensemble: Ensemble, num_data: int) -> None:
        self.ensemble, self.num_data = ensemble, num_data

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: object, *, model: nn.Module, **_: object
    ) -> None:
        """Draw the start, unless the run is resumed, and refuse the seed of an earlier member."""
        name = self.ensemble.name
        record = recall(require_lora(model), name)
        begins = state.global_step == 0  # else it is resumed, and what was kept of it when it stopped is replaced
        if record is None or (begins and len(record.learned) >= self.ensemble.members):
            record = Record(name, self.num_data, {})
            remember(model, record)
        if not begins:
            _check_seed(state, args.output_dir, args.seed)
            return
        if args.seed in record.learned:
            raise InputError(
                f"an earlier member was trained with seed {args.seed} already; give each member its own arguments, "
                "method.member_arguments(args, member)"
            )
        initialise(model, args.seed)


def _check_seed(state: TrainerState, folder: str, seed: int) -> None:
    """Refuse to resume a run that was begun with another seed."""
    before = seed_of_checkpoint(state)
    if before != seed:
        known = "an older version, which numbered members otherwise" if before is None else f"seed {before}"
        raise InputError(
            f"{folder} was begun with {known}, and this member has seed {seed}: it would be two members in one; "
            "finish it as it was begun, or train it anew"
        )


@final
class _Keep(TrainerCallback):
    """Keeps a run's posterior when it ends, after the member's own callbacks have done what they do then."""

    def __init__(self, ensemble: Ensemble) -> None:
        self.ensemble = ensemble

    def on_train_end(
        self, args: TrainingArguments, state: object, control: object, *, model: nn.Module, **_: object
    ) -> None:
        """Keep the member."""
        member = self.ensemble.member
        assert isinstance(member, Method)  # `Ensemble.trainer_kwargs` refuses others
        require_record(model, self.ensemble.name).learned[args.seed] = member.posterior(model)
