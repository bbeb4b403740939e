"""One plain adapter in the place of many draws: trained to give the draws' average probabilities.

The loss is KL(p̄ ‖ q_θ) over the choices, with p̄ the posterior predictive (Hinton et al. 2015, arXiv 1503.02531, at
temperature 1; Bayesian dark knowledge: Korattikara et al. 2015, arXiv 1506.04416). What is lost is what the draws
disagree about: one adapter has probabilities, and no mutual information.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from bayeslora._typing import Float
from bayeslora.engine import predict, readout_for
from bayeslora.errors import InputError
from bayeslora.origin import origin_of
from bayeslora.params import read, write
from bayeslora.posteriors import Point, Posterior, Sampling
from bayeslora.tasks.types import Split
from bayeslora.trainer import run_trainer


def distill(
    model: nn.Module,
    posterior: Posterior,
    rows: Split,
    args: TrainingArguments,
    draws: int = 20,
    *,
    seed: int = 0,
    sampling: Sampling = "independent",
    tokenizer: Any = None,
    token_budget: int | None = None,
) -> Point:
    """Return one adapter that answers as the draws do on average.

    Args:
        model: PEFT model of the posterior; it ends as the distilled adapter.
        posterior: The posterior; training starts at its mean.
        rows: Examples to learn from; their labels are not looked at. On rows that the posterior was trained on the
            draws are surer than on others, so others are better.
        args: Arguments of the Trainer.
        draws: Draws of each example.
        seed: Which stream of draws.
        sampling: How the draws belong together.
        tokenizer: The model's tokenizer; None loads the one that was saved with the model.
        token_budget: Most tokens of a prediction batch; None for what fits.

    Returns:
        The adapter, a posterior without spread.

    Raises:
        InputError: If there are no examples, or something does not fit.
    """
    if not len(rows):
        raise InputError(f"{rows.name} has no examples to distil from")
    said = predict(
        model, posterior, rows, draws, seed=seed, sampling=sampling, mean=False, tokenizer=tokenizer,
        token_budget=token_budget,
    )  # fmt: skip
    write(model, posterior.mean)
    readout = readout_for(model, rows, tokenizer)
    numbered = [replace(row, label=i) for i, row in enumerate(readout.encode(rows)[0])]
    run_trainer(model, readout, numbered, args, {"compute_loss_func": soft_loss(said.log_p)})
    made_of = posterior.origin.method if posterior.origin is not None else ""
    settings = {"draws": said.draws, "sampling": sampling, "of": made_of}
    return Point(read(model), origin_of(model, "distilled", settings, len(rows)))


def soft_loss(log_p: Float[Tensor, "N C"]) -> Callable[..., Tensor]:
    """Return the divergence of the model's answers from given ones, as a ``compute_loss_func`` of the Trainer.

    Args:
        log_p: Log-probabilities of N examples; -inf for choices that an example does not have.

    Returns:
        A function of outputs with ``logits`` [B C], labels [B] that are numbers of examples, and what to divide the sum
        by (None for the mean).
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return Σ KL(p̄ ‖ q) in nats, divided."""
        log_q = outputs["logits"].float().log_softmax(-1)
        wanted = log_p.to(log_q.device)[labels][:, : log_q.shape[-1]]
        gap = (wanted - log_q).masked_fill(torch.isneginf(wanted), 0.0)
        return (wanted.exp() * gap).sum() / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss
