"""A beginning that all prompts have in common (an instruction, solved examples) is run once for each draw.

Its keys and values are kept, and every batch goes on from them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from bayeslora.params import device_of, require_lora
from bayeslora.prediction.encoding import Encoded

WORTHWHILE = 16
"""Tokens from which on a common beginning is run by itself."""


def common(rows: Sequence[Encoded]) -> tuple[int, ...]:
    """Return the longest beginning that all prompts have in common, each with at least one token after it.

    Args:
        rows: Encoded examples.

    Returns:
        Token ids; none if there are fewer than two examples.
    """
    if len(rows) < 2:
        return ()
    first, last = min(row.prompt for row in rows), max(row.prompt for row in rows)  # in the order of their tokens
    most = min(len(row.prompt) for row in rows) - 1
    size = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), most)
    return first[: min(size, most)]


def without(rows: Sequence[Encoded], size: int) -> list[Encoded]:
    """Return examples whose prompts lack their first tokens.

    Args:
        rows: Encoded examples.
        size: How many tokens.

    Returns:
        The examples.
    """
    return [replace(row, prompt=row.prompt[size:]) for row in rows]


def run(model: nn.Module, tokens: Sequence[int], count: int) -> Any:
    """Pass a beginning through the model's layers, and keep what attention needs of it.

    Args:
        model: PEFT model, a causal language model.
        tokens: Token ids of the beginning.
        count: How many copies: the number of stacked draws, or 1 where they share the first layers.

    Returns:
        Its keys and values; None if the model keeps something else.
    """
    base = require_lora(model).get_base_model()
    layers = getattr(base, base.base_model_prefix)
    ids = torch.tensor([list(tokens)] * count, device=device_of(model))
    kept = DynamicCache(config=base.config)
    layers(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=kept, use_cache=True)
    whole = all(type(layer) is DynamicLayer and layer.get_seq_length() == len(tokens) for layer in kept.layers)
    return kept if whole and kept.layers else None


def go_on(batch: dict[str, Tensor], kept: Any, rows: int) -> dict[str, Any]:
    """Return a batch that goes on from a beginning.

    Args:
        batch: What `Readout.collate` returns for prompts without their beginning, repeated for the draws.
        kept: What `run` returned.
        rows: Number of examples in the batch, each draw's counted once.

    Returns:
        The batch with the beginning's keys and values; the mask and the positions take it into account.
    """
    size = kept.get_seq_length()
    mine = copy.copy(kept)
    mine.layers = [copy.copy(layer) for layer in kept.layers]
    for layer in mine.layers:
        layer.batch_repeat_interleave(rows)
    mask = batch["attention_mask"]
    seen = 1 if mask.ndim == 2 else 0  # a mask of four axes is added to the scores
    return {
        **batch,
        "attention_mask": nn.functional.pad(mask, (size, 0), value=seen),
        "position_ids": batch["position_ids"] + size,
        "past_key_values": mine,
    }
