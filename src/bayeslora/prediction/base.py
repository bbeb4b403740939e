"""The untuned base beside its adapter: what makes a PEFT model answer as its base, and where no base is left to ask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from bayeslora.errors import InputError
from bayeslora.params import Params, lora_parameters, require_lora
from bayeslora.posteriors import Draws, Posterior
from bayeslora.prediction.stacking import differing, layers_that_differ

_MATRICES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_UPPER = ("lora_B", "lora_embedding_B")
"""The matrices (and biases) whose zeros leave the base's output as it is."""
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that leave the base's weights as they are; others (PiSSA, OLoRA, …) change them."""


def check_base_answers(model: nn.Module) -> None:
    """Refuse a model whose base cannot be asked any more, or has no answer of its own.

    Raises:
        InputError: If the head was trained with the adapter, or the adapter has changed the base.
    """
    peft = require_lora(model)
    config = peft.active_peft_config
    if head := _trained_head(peft):
        raise InputError(
            f"the base has no answer of its own: its classification head ({head}) was trained with the adapter; use a "
            "causal language model with the readout 'letters' or 'likelihood', or leave the base out"
        )
    if config.bias != "none":
        raise InputError(
            f"the adapter trained the base's biases (bias={config.bias!r}), and their former values are lost; leave "
            "the base out, or train with bias='none'"
        )
    if config.init_lora_weights not in _STARTS:
        raise InputError(
            f"init_lora_weights={config.init_lora_weights!r} has changed the base's weights, so the base cannot be "
            "asked through the adapter; leave the base out, or convert the adapter to plain LoRA (PEFT's "
            "path_initial_model_for_weight_conversion)"
        )
    if getattr(config, "layer_replication", None):
        raise InputError("layer_replication has changed the base's layers, so the base cannot be asked; leave it out")


def base_params(model: nn.Module, params: Params) -> Params | None:
    """Return an adapter with which the model is its base, by B = 0; None where only `as_base` makes it that.

    B = 0 is not enough for a trained magnitude (DoRA) and other variants, and for modules that were trained whole.
    """
    layers = [module for module in require_lora(model).modules() if isinstance(module, LoraLayer)]
    plain = all(any(part in _MATRICES for part in name.split(".")) for name in params)
    if not plain or any(layer.lora_variant for layer in layers):
        return None
    return {
        name: torch.zeros_like(value) if any(part in _UPPER for part in name.split(".")) else value
        for name, value in params.items()
    }


def base_beside(model: nn.Module, posterior: Posterior, draws: Draws) -> list[Params]:
    """Return the base as one more of a posterior's draws; nothing where a pass of its own is right, or costs less."""
    base = None if posterior.before_answer is not None else base_params(model, posterior.mean)
    if base is None:
        return []
    few = [posterior.mean, *(posterior.cached_draw(k, draws) for k in range(min(2, draws.count)))]
    # draws that are the same in the first layers pass those as one; with a base that is another there they could not
    own = layers_that_differ(model, differing(few))
    return [] if own and len(layers_that_differ(model, differing([*few, base]))) != len(own) else [base]


@contextmanager
def as_base(model: nn.Module) -> Iterator[None]:
    """Make a model its base for the length of a ``with`` block; what it trains is afterwards as before."""
    peft = require_lora(model)
    trained = [(p, p.requires_grad) for p in peft.parameters()]  # PEFT sets them anew on the way out
    try:
        with peft.disable_adapter():
            yield
    finally:
        for p, requires_grad in trained:
            p.requires_grad_(requires_grad)


@contextmanager
def asking_base(model: nn.Module, params: Params) -> Iterator[Params]:
    """Yield the adapter to pass with, so that the model answers as its base inside the ``with`` block."""
    base = base_params(model, params)
    with as_base(model) if base is None else nullcontext():
        yield params if base is None else base


def _trained_head(peft: PeftModel) -> str:
    """Return the name of a classification head's parameter that is trained whole; empty if there is none."""
    base = peft.get_base_model()
    if "ForSequenceClassification" not in type(base).__name__:
        return ""
    body = f"base_model.model.{base.base_model_prefix}."
    return next((n for n in lora_parameters(peft) if ".lora_" not in n and not n.startswith(body)), "")
