"""One plain adapter in the place of many draws: trained to give the draws' average probabilities.

The loss is KL(p̄ ‖ q_θ) over the choices, with p̄ the posterior predictive (Hinton et al. 2015, arXiv 1503.02531, at
temperature 1; Bayesian dark knowledge: Korattikara et al. 2015, arXiv 1506.04416). What is lost is what the draws
disagree about: one adapter has probabilities, and no mutual information.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from bayeslora._typing import Float, Tokenizer
from bayeslora.errors import InputError
from bayeslora.methods.regularisers import divided
from bayeslora.metrics.uncertainty import divergences
from bayeslora.params import Params, generator, read, write
from bayeslora.posteriors import Draws, Point, Posterior
from bayeslora.posteriors.provenance import origin_of, scored
from bayeslora.posteriors.sampling import former_keywords
from bayeslora.prediction import predict, readout_for
from bayeslora.processes import sharded
from bayeslora.tasks.types import Split
from bayeslora.training.rounds import IGNORED
from bayeslora.training.trainer import TrainerRun, refuse_fsdp, run_trainer

logger = logging.getLogger(__name__)


@former_keywords(seed="draws.seed", sampling="draws.sampling")
def distill(
    model: nn.Module,
    posterior: Posterior,
    rows: Split,
    args: TrainingArguments,
    draws: int | Draws = 20,
    *,
    held_out: float = 0.2,
    tokenizer: Tokenizer | None = None,
    token_budget: int | None = None,
) -> Point:
    """Return one adapter that answers as the draws do on average.

    Some rows are not learned from: after each epoch, or when the arguments say so, the divergence is measured on them,
    and the adapter that came closest is kept. The mean, where training starts, is the first candidate, so the result is
    never further from the draws there than the mean is.

    Args:
        model: PEFT model of the posterior; it ends as the distilled adapter.
        posterior: The posterior; training starts at its mean.
        rows: Examples to learn from; their labels are not looked at. On rows that the posterior was trained on the
            draws are surer than on others, so others are better.
        args: Arguments of the Trainer.
        draws: Draws of each example: their number, or `Draws`; 0 for the mean of a scaled posterior.
        held_out: Share of the rows that choose what is kept, drawn with the seed of the arguments; 0 keeps the end of
            the training.
        tokenizer: The model's tokenizer; None loads the one that was saved with the model.
        token_budget: Most tokens of a prediction batch; None for what fits.

    Returns:
        The adapter, a posterior without spread. Its origin's settings have the ``divergence`` in nats on the held-out
        rows, and that of the mean as ``divergence_of_mean``.

    Raises:
        InputError: If there are too few examples, ``held_out`` is no share, or something does not fit.
    """
    draws = Draws.of(draws)
    if not draws.count and posterior.unscaled is posterior:
        raise InputError("the mean is one plain adapter already: export it (bayeslora export --mean), or give draws")
    refuse_fsdp(args, "what is distilled is predicted first")
    judges, learned = _held_out(rows, held_out, args.seed)
    with sharded():
        prediction = predict(
            model, posterior, rows, draws, mean=bool(judges), tokenizer=tokenizer, token_budget=token_budget
        )
    write(model, posterior.mean)
    readout = readout_for(model, rows, tokenizer)
    encoded = [replace(row, label=i) for i, row in enumerate(readout.encode(rows)[0])]
    run = TrainerRun(
        model, readout, [encoded[i] for i in learned], [encoded[i] for i in judges] or None, args,
        {"compute_loss_func": soft_loss(prediction.log_p)},
    )  # fmt: skip
    teacher = posterior.origin.method if posterior.origin is not None else ""
    settings: dict[str, object] = {"draws": prediction.draws, "sampling": draws.sampling, "of": teacher}
    if prediction.mean_log_probs is None:
        run_trainer(run)
    else:
        before = float(divergences(prediction.log_p[judges], prediction.mean_log_probs[judges]).mean())
        settings |= {"held_out": len(judges), **_train_to_the_closest(run, before, posterior.mean)}
    return Point(read(model), scored(origin_of(model, "distilled", settings, len(learned)), rows.normalisation))


def _held_out(rows: Split, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the numbers of the rows that choose what is kept, and of those that are learned from."""
    if not len(rows):
        raise InputError(f"{rows.name} has no examples to distil from")
    if not 0 <= held_out < 1:
        raise InputError(f"held_out is a share of the rows, from 0 to less than 1, and it is {held_out}")
    apart = round(held_out * len(rows))
    if held_out and not 0 < apart < len(rows):
        raise InputError(
            f"{rows.name} has {len(rows)} examples, too few to hold out {held_out:g} of them; give more, or held_out=0"
        )
    order = torch.randperm(len(rows), generator=generator("held-out rows", seed)).tolist()
    return order[:apart], order[apart:]


def _train_to_the_closest(run: TrainerRun, divergence: float, mean: Params) -> dict[str, float]:
    """Train, and write into the model the adapter that was closest on the held-out rows; return the divergences."""
    args, closest = copy.copy(run.args), _Closest(divergence, mean)
    if args.eval_strategy == IntervalStrategy.NO:
        args.eval_strategy, args.do_eval = IntervalStrategy.EPOCH, True
    run_trainer(replace(run, args=args, kwargs={**run.kwargs, "callbacks": [closest], "compute_metrics": None}))
    write(run.model, closest.params)
    logger.info("On held-out rows: divergence %.4g, of the mean %.4g nats.", closest.divergence, divergence)
    if closest.divergence >= divergence > 0:
        logger.warning("no epoch came closer to the draws than the mean, which is kept; take more rows or another rate")
    return {"divergence": closest.divergence, "divergence_of_mean": divergence}


@final
class _Closest(TrainerCallback):
    """Keeps the adapter whose evaluation was best."""

    def __init__(self, divergence: float, params: Params) -> None:
        self.divergence, self.params = divergence, params

    def on_evaluate(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Compare with the best so far."""
        if kwargs["metrics"]["eval_loss"] < self.divergence:
            self.divergence, self.params = kwargs["metrics"]["eval_loss"], read(kwargs["model"])


def soft_loss(log_p: Float[Tensor, "N C"]) -> Callable[..., Tensor]:
    """Return a ``compute_loss_func``: the divergence of a batch's answers from given ones; labels are row numbers."""

    def loss(outputs: Mapping[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return Σ KL(p̄ ‖ q) in nats, divided."""
        log_q = outputs["logits"].float().log_softmax(-1)
        labels = labels.to(log_q.device)
        each = divergences(log_p.to(log_q.device)[labels.clamp_min(0)][:, : log_q.shape[-1]], log_q)
        return divided(torch.where(labels != IGNORED, each, 0.0).sum(), num_items_in_batch, len(labels))

    return loss
