"""What fits into memory: how many tokens and draws at once, and halving of what turns out to be too large."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from bayeslora.params import Params, device_of, lora_parameters, require_lora
from bayeslora.posteriors import Posterior
from bayeslora.posteriors.keeping import numbers

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
P = TypeVar("P", bound=Posterior)

CPU_BUDGET = 2048
"""On a CPU larger batches leave its caches and gain nothing."""
GPU_BUDGET = 32768
"""On a GPU more tokens at once gain nothing."""
CPU_PADDING = 64
"""Tokens whose pass takes about as long on a CPU as what a batch costs beside its tokens."""
GPU_PADDING = 4096
_SHARE = 0.5
"""Part of the free memory that a batch may take by the estimate, which is a rough one; what fails is halved."""
_PART = 4
"""The matrices of stacked draws take at most this part of the memory that the model takes, a quarter, or `_LITTLE`, and
the draws that they are made of as much again; a posterior's copy on an accelerator takes no more than that part."""
_LITTLE = 2**28
"""Bytes that a machine with a model spares: small models have adapters that are large beside them."""
_ELSEWHERE = ("cpu", "meta", "mps")
"""Devices for which draws are made on the CPU: it itself, what offloads to it, and one without float64."""


def lacks_memory(error: Exception) -> bool:
    """Say whether an error is a lack of memory, whichever library words it."""
    words = str(error).lower()
    return isinstance(error, RuntimeError) and (
        isinstance(error, torch.OutOfMemoryError)
        or should_reduce_batch_size(error)
        or "out of memory" in words
        or "cublas_status_alloc_failed" in words
    )


def in_halves(
    run: Callable[[Sequence[Item]], object],
    batches: Iterable[Sequence[Item]],
    again: Callable[[Sequence[Item]], bool] = lambda batch: True,
) -> list[Item]:
    """Run batches in order, in halves where necessary if ``again`` lets them; return what does not fit alone."""
    waiting = deque(batches)
    too_large: list[Item] = []
    while waiting:
        batch = waiting.popleft()
        try:
            run(batch)
            continue
        except RuntimeError as error:
            if not lacks_memory(error) or not again(batch):
                raise
        clear_device_cache(garbage_collection=True)  # after the handler, which holds the frames and their tensors
        if len(batch) == 1:
            too_large += batch
        else:
            logger.warning("a batch of %d does not fit into memory; it is halved", len(batch))
            waiting.extendleft([batch[len(batch) // 2 :], batch[: len(batch) // 2]])
    return too_large


def max_padding(model: nn.Module) -> int:
    """Return how much padding a batch may hold on the model's device, in tokens, before another batch costs less."""
    return CPU_PADDING if device_of(model).type == "cpu" else GPU_PADDING


def max_stacked(model: nn.Module, draw: Params) -> int:
    """Return how many draws as large as this one may be stacked at once, at least 1."""
    return max(1, max(_bytes(model) // _PART, _LITTLE) // (4 * sum(value.numel() for value in draw.values())))


def draws_for(model: nn.Module, posterior: P) -> P:
    """Return the posterior where its draws are best made: on the model's accelerator, if a copy is small enough."""
    devices = {name: p.device for name, p in lora_parameters(model).items() if p.device.type not in _ELSEWHERE}
    if not devices or _PART * 4 * numbers(posterior) > _bytes(model):
        return posterior
    return posterior.placed(devices)


def _bytes(model: nn.Module) -> int:
    """Return the memory that a model's parameters take."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def token_bytes(model: nn.Module, *, gradients: bool = False) -> int:
    """Return the estimate of what a token of a batch takes on an accelerator, in bytes."""
    base = require_lora(model).get_base_model()
    config = base.config.get_text_config()
    hidden, layers, size = config.hidden_size, config.num_hidden_layers, base.dtype.itemsize
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    # inside a layer; then keys and values in every layer, and the logits with their float32 copies
    inside = size * (10 * hidden + 3 * inner + 2 * hidden * layers)
    if gradients:  # every layer keeps what a prediction needs for one, and the gradients are float32
        inside = (size + 4) * layers * (10 * hidden + 3 * inner)
    total: int = inside + (size + 8) * config.vocab_size
    return total


def default_token_budget(model: nn.Module, *, gradients: bool = False) -> int:
    """Return how many tokens, padding included, a batch may have on the model's device."""
    device = device_of(model)
    if device.type != "cuda":
        return CPU_BUDGET
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, min(GPU_BUDGET, int(_SHARE * (free + held)) // token_bytes(model, gradients=gradients)))
