"""A model's layers compiled: `torch.compile` on each, which all share one code, since they differ in weights only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from bayeslora.errors import InputError
from bayeslora.params import require_lora


@contextmanager
def compiled(model: nn.Module, backend: str | None = None, mode: str | None = None) -> Iterator[None]:
    """Run a model's layers compiled for the length of a ``with`` block, by `torch.compile`'s backend and mode."""
    lists = (m for m in require_lora(model).get_base_model().modules() if isinstance(m, nn.ModuleList) and len(m) > 1)
    layers = next(lists, None)  # the outermost list comes first
    if layers is None:
        raise InputError("this model has no list of layers that could be compiled; leave compilation off")
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = torch.compile(layer.forward, backend=backend or "inductor", mode=mode)
        yield
    except TorchDynamoException as error:
        cause = getattr(error, "inner_exception", error)
        reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise InputError(f"the model's layers cannot be compiled here: {reason}; leave compilation off") from error
    finally:
        for layer, forward in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward
