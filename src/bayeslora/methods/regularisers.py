"""The loss on the answer, its KL term to the base model, and decoupled weight decay, for any Trainer.

Losses divide by ``num_items_in_batch``, so that gradient accumulation gives the gradient of the joint batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback, TrainingArguments

from bayeslora._typing import Float, Int
from bayeslora.errors import InputError
from bayeslora.params import evaluating, lora_parameters, require_lora

Outputs = Mapping[str, Tensor]
"""What a model returns; of it only ``logits`` is looked at."""


def answer_loss(outputs: Outputs, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Float[Tensor, ""]:
    """Return the cross-entropy of the answers, as a ``compute_loss_func`` of the Trainer; None for the mean.

    Logits are [B C] with labels [B], or [B T V] with labels [B T]; labels are -100 where nothing is predicted.
    """
    logits, targets = _flat(outputs["logits"], labels)
    return divided(functional.cross_entropy(logits, targets, reduction="sum"), num_items_in_batch, len(targets))


def divided(total: Tensor, num_items_in_batch: Tensor | int | None, count: int) -> Float[Tensor, ""]:
    """Return a sum over ``count`` items divided by the number of items in the batch, wherever that number is."""
    number = count if num_items_in_batch is None else num_items_in_batch
    return total / (number.to(total.device) if isinstance(number, Tensor) else number)


def _flat(logits: Tensor, labels: Tensor) -> tuple[Float[Tensor, "P C"], Int[Tensor, " P"]]:
    """Return the predicted positions' logits, float32, and their labels; a language model's are shifted by one."""
    if logits.ndim == 3:
        logits, labels = logits[:, :-1], labels[:, 1:].to(logits.device)
        predicted = labels != -100
        return logits[predicted].float(), labels[predicted]
    return logits.float(), labels.to(logits.device)


@final
class KlToBase(TrainerCallback):
    """Adds β·KL(p_θ(·|x) ‖ p_base(·|x)) on the answer distribution (arXiv 2310.00035, §3.1); ``weight`` is β."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self._batch: tuple[nn.Module, tuple[object, ...], dict[str, object]] | None = None
        self._detach: weakref.finalize[..., KlToBase] | None = None
        self._asked = False

    def on_train_begin(self, args: object, state: object, control: object, *, model: nn.Module, **_: object) -> None:
        """Start to keep each training batch for the second pass; refuse a model whose head is new."""
        new = require_lora(model).active_peft_config.modules_to_save
        if new:
            raise InputError(
                "kl needs a base model with answers of its own, and this one has a new head "
                f"({', '.join(new)}); use kl=0"
            )
        this = weakref.ref(self)

        def keep(model: nn.Module, positional: tuple[object, ...], named: dict[str, object]) -> None:
            """Keep a training batch for the second pass."""
            callback = this()
            if callback is not None and torch.is_grad_enabled():
                callback._batch = model, positional, dict(named)

        hook = model.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
        self._detach = weakref.finalize(self, hook.remove)  # a run that breaks off does not end, but its callback goes

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        """Refuse a Trainer that has taken a step without asking for the loss."""
        if not self._asked:
            raise InputError(
                "the Trainer does not call compute_loss_func, so that the KL term would be left out; use kl=0"
            )

    def on_train_end(self, args: object, state: object, control: object, **_: object) -> None:
        """Stop."""
        if self._detach is not None:
            self._detach()
        self._detach = self._batch = None

    def loss(
        self, outputs: Outputs, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Float[Tensor, ""]:
        """Return the cross-entropy (see `answer_loss`), in training with the divergence added."""
        self._asked = True
        loss = answer_loss(outputs, labels, num_items_in_batch)
        if self._batch is None or not torch.is_grad_enabled():
            return loss
        (model, positional, named), self._batch = self._batch, None
        with torch.no_grad(), evaluating(model), require_lora(model).disable_adapter():
            base = model(*positional, **named)["logits"]
        ours, targets = _flat(outputs["logits"], labels)
        theirs, _ = _flat(base, labels)
        log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
        finite = torch.isfinite(log_p) & torch.isfinite(log_q)
        gap = log_p.masked_fill(~finite, 0) - log_q.masked_fill(~finite, 0)
        each = (log_p.exp().masked_fill(~finite, 0) * gap).sum(-1)
        divergence = torch.where(targets != -100, each, 0.0).sum()
        return loss + self.weight * divided(divergence, num_items_in_batch, len(ours)).to(loss.device)


@final
class DecoupledDecay(TrainerCallback):
    """Multiplies parameters by 1 − η·λ before each step, as AdamW does; λ is ``everything``, plus ``b`` for each B."""

    def __init__(self, everything: float, b: float) -> None:
        self.everything, self.b = everything, b
        self._rates: dict[int, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: object, control: object, *, model: nn.Module, **_: object
    ) -> None:
        """Note which parameter decays how fast; refuse a rate at which a step would turn its sign."""
        params = lora_parameters(model)
        rates = {name: self.everything + self.b * ("lora_B" in name) for name in params}
        if max(rates.values()) * args.learning_rate >= 1:
            raise InputError(
                f"weight decay {max(rates.values()):g} times learning rate {args.learning_rate:g} is not below 1; "
                "lower one of them"
            )
        self._rates = {id(p): rates[name] for name, p in params.items()}

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Decay, at the learning rate of the step that comes."""
        for group in kwargs["optimizer"].param_groups:
            for p in group["params"]:
                rate = self._rates.get(id(p), 0.0)
                if rate and p.grad is not None:
                    p.mul_(1 - group["lr"] * rate)
