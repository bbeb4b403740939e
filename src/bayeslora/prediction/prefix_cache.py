"""A prefix that all prompts have in common is run once for each draw; batches go on from its keys and values."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from bayeslora.models import cache_argument
from bayeslora.params import device_of, require_lora
from bayeslora.prediction.encoding import Encoded

WORTHWHILE = 16
"""Tokens from which on a common prefix is run by itself."""


def common_prefix(rows: Sequence[Encoded]) -> tuple[int, ...]:
    """Return the longest prefix of two or more prompts that leaves each a token."""
    if len(rows) < 2:
        return ()
    first, last = min(row.prompt for row in rows), max(row.prompt for row in rows)  # in the order of their tokens
    most = min(len(row.prompt) for row in rows) - 1
    size = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), most)
    return first[: min(size, most)]


def without_prefix(rows: Sequence[Encoded], size: int) -> list[Encoded]:
    """Return examples whose prompts lack their first tokens."""
    return [replace(row, prompt=row.prompt[size:]) for row in rows]


def prefix_cache(model: nn.Module, tokens: Sequence[int], count: int) -> DynamicCache | None:
    """Return the keys and values of a prefix, once for each stacked draw; None if the model keeps something else."""
    base = require_lora(model).get_base_model()
    layers = getattr(base, base.base_model_prefix)
    ids = torch.tensor([list(tokens)] * count, device=device_of(model))
    cache = DynamicCache(config=base.config)
    keys_and_values = {cache_argument(layers.forward): cache}
    layers(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **keys_and_values)
    whole = all(type(layer) is DynamicLayer and layer.get_seq_length() == len(tokens) for layer in cache.layers)
    return cache if whole and cache.layers else None


def continued(model: nn.Module, batch: Mapping[str, Tensor], cache: DynamicCache) -> dict[str, object]:
    """Return a batch of prompts without their prefix that goes on from the keys and values of each draw's prefix."""
    size = cache.get_seq_length()
    expanded = copy.copy(cache)
    expanded.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in expanded.layers:
        layer.batch_repeat_interleave(len(batch["input_ids"]))
    mask = batch["attention_mask"]
    seen = 1 if mask.ndim == 2 else 0  # a mask of four axes is added to the scores
    return {
        **batch,
        "attention_mask": nn.functional.pad(mask, (size, 0), value=seen),
        "position_ids": batch["position_ids"] + size,
        cache_argument(require_lora(model).get_base_model().forward): expanded,
    }
