"""Keys and values of the tokens that come first, for passes that go on from there.

A prefix that all prompts have in common is run once for each draw. Where only the answers' tokens have noise, the
tokens before them are run once, under the weights without noise, and all draws go on from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from bayeslora._typing import Float, Int
from bayeslora.models import cache_argument
from bayeslora.params import device_of, require_lora
from bayeslora.prediction.encoding import Encoded

REFUSED = (
    "the noise of this model cannot be kept to the answers' tokens, for which its adapted layers must be linear and "
    "its attention causal over all tokens; use draws whose noise is on all tokens"
)
"""What is said of a model that does not go on from keys and values."""
WORTHWHILE = 16
"""Tokens from which on a common prefix is run by itself."""


@final
class _FixedLayer(DynamicLayer):
    """Keys and values that any number of passes go on from: what a pass adds is not kept."""

    def __init__(self, keys: Float[Tensor, "R H T D"], values: Float[Tensor, "R H T D"], rows: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.rows = keys, values, rows.to(keys.device)
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all tokens, the first ones repeated for each stacked draw."""
        return self._joined(self.keys, key_states), self._joined(self.values, value_states)

    def _joined(self, first: Float[Tensor, "R H T D"], new: Float[Tensor, "N H Q D"]) -> Float[Tensor, "N H P D"]:
        """Return the first tokens and the new ones, each copied once."""
        first = first[self.rows]
        size, tokens = first.shape[2], first.shape[2] + new.shape[2]
        joined = new.new_empty(len(new) // len(first), len(first), new.shape[1], tokens, new.shape[3])
        joined[..., :size, :] = first
        joined[..., size:, :] = new.view(*joined.shape[:3], *new.shape[2:])
        return joined.flatten(0, 1)


@final
@dataclass(frozen=True)
class Start:
    """What the first T tokens leave behind, once for each of R draws or R rows: keys and values [R H T D] by layer."""

    of: Literal["draws", "rows"]
    layers: Sequence[tuple[Tensor, Tensor]]  # of one row each before the first that differs between the draws
    mask: Int[Tensor, "R T"]  # 0 where there is padding

    def continued(self, model: nn.Module, batch: Mapping[str, Tensor], owners: Sequence[int]) -> dict[str, object]:
        """Return a batch of B sequences that go on from here; ``owners`` are the rows that they belong to."""
        ids, mask = batch["input_ids"], batch["attention_mask"]

        def rows(count: int) -> Int[Tensor, " M"]:
            """Return the rows, of so many, that sequences go on from, draw after draw where each has its own."""
            if count == 1:
                return torch.zeros(len(ids), dtype=torch.long)
            return torch.arange(count).repeat_interleave(len(ids)) if self.of == "draws" else torch.tensor(owners)

        seen = self.mask[rows(len(self.mask))[: len(ids)]]
        before = (
            seen if mask.ndim == 2  # a mask of four axes is added to the scores
            else torch.zeros_like(seen, dtype=mask.dtype).masked_fill(seen == 0, torch.finfo(mask.dtype).min)
            [:, None, None].expand(-1, -1, mask.shape[2], -1)
        )  # fmt: skip
        positions = batch.get("position_ids", torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
        cache = DynamicCache()
        cache.layers = [_FixedLayer(keys, values, rows(len(keys))) for keys, values in self.layers]
        base = require_lora(model).get_base_model()
        return {
            **batch,
            "attention_mask": torch.cat([before, mask], -1),
            "position_ids": positions + seen.sum(1, keepdim=True),
            cache_argument(getattr(base, base.base_model_prefix).forward): cache,
        }


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


def answers_alone(rows: Sequence[Encoded]) -> list[Encoded]:
    """Return examples whose prompts are their last tokens, which predict the first of the answer."""
    return [replace(row, prompt=row.prompt[-1:]) for row in rows]


def prefix_start(model: nn.Module, tokens: Sequence[int], count: int) -> Start | None:
    """Return a prefix's keys and values, once for each stacked draw; None if the model keeps something else."""
    return start_of(model, "draws", torch.tensor([list(tokens)] * count))


def prompts_start(model: nn.Module, rows: Sequence[Encoded], prefix: Start | None) -> Start | None:
    """Return keys and values of each prompt but for its last token; None if the model keeps something else.

    The prompts lack the ``prefix``. If no token is left, they are those of the prefix, in one row.
    """
    stems = [row.prompt[:-1] for row in rows]
    width = max(map(len, stems))
    if not width:
        return prefix
    ids = torch.tensor([[*stem, *[0] * (width - len(stem))] for stem in stems])
    mask = torch.tensor([[1] * len(stem) + [0] * (width - len(stem)) for stem in stems])
    return start_of(model, "rows", ids, mask, prefix)


def start_of(
    model: nn.Module,
    of: Literal["draws", "rows"],
    ids: Int[Tensor, "R T"],
    mask: Int[Tensor, "R T"] | None = None,
    prefix: Start | None = None,
) -> Start | None:
    """Return what tokens leave behind, after a prefix if one is given; None if the model keeps something else."""
    base = require_lora(model).get_base_model()
    layers = getattr(base, base.base_model_prefix)
    ids = ids.to(device_of(model))
    mask = torch.ones_like(ids) if mask is None else mask.to(ids)
    cache = DynamicCache(config=base.config)
    if prefix is not None:
        for layer, (keys, values) in zip(cache.layers, prefix.layers, strict=True):
            layer.update(keys.expand(len(ids), -1, -1, -1), values.expand(len(ids), -1, -1, -1))
        mask = torch.cat([prefix.mask.expand(len(ids), -1), mask], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    layers(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
        **{cache_argument(layers.forward): cache},
    )  # fmt: skip
    whole = all(type(layer) is DynamicLayer and layer.get_seq_length() == mask.shape[1] for layer in cache.layers)
    return Start(of, [(layer.keys, layer.values) for layer in cache.layers], mask) if whole and cache.layers else None
