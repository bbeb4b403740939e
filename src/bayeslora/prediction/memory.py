"""How many tokens a batch may have."""

from __future__ import annotations

import torch
from torch import nn

from bayeslora.params import Params, device_of, require_lora

CPU_BUDGET = 2048
"""On a CPU larger batches leave its caches and gain nothing."""
GPU_BUDGET = 32768
"""On a GPU more tokens at once gain nothing."""
_SHARE = 0.5
"""Part of the free memory that a batch may take by the estimate, which is a rough one; what fails is halved."""
_PART = 4
"""The matrices of stacked draws take at most this part of the memory that the model takes: a quarter."""


def max_stacked(model: nn.Module, one: Params) -> int:
    """Return how many draws may be stacked at once.

    Args:
        model: A PEFT model.
        one: A draw; the others are as large.

    Returns:
        At least 1.
    """
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    return max(1, whole // (_PART * 4 * sum(value.numel() for value in one.values())))


def default_token_budget(model: nn.Module, *, gradients: bool = False) -> int:
    """Return how many tokens a batch may have on the model's device.

    A token needs, by estimate, ten times the hidden size and three times the inner size of the layers in the model's
    dtype, its keys and values in every layer, and the logits with their float32 copies. Where it is differentiated
    backwards, every layer keeps what a prediction needs for one, and the gradients take as much again in float32.

    Args:
        model: A PEFT model.
        gradients: Whether the batch is differentiated.

    Returns:
        Tokens, padding included.
    """
    device = device_of(model)
    if device.type != "cuda":
        return CPU_BUDGET
    base = require_lora(model).get_base_model()
    config = base.config.get_text_config()
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    size = base.dtype.itemsize
    layers = config.num_hidden_layers
    inside = size * (10 * hidden + 3 * inner + 2 * hidden * layers)
    if gradients:
        inside = (size + 4) * layers * (10 * hidden + 3 * inner)
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, min(GPU_BUDGET, int(_SHARE * (free + held)) // (inside + (size + 8) * config.vocab_size)))
