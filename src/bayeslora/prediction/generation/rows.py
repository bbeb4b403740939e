"""Rows in the making: they join and leave between two tokens, and each keeps the keys and values of its draws."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from bayeslora._typing import Float, Int
from bayeslora.models import cache_argument
from bayeslora.params import device_of, evaluating, generator, require_lora
from bayeslora.prediction.generation.averaging import DrawsCache
from bayeslora.prediction.prefix_cache import Start
from bayeslora.prediction.probes import tried

_CLOSE = 0.1
"""Largest difference from the passes of each row alone, by the difference of two rows, that is taken for rounding."""


@final
class Rows:
    """R rows of a causal language model under S draws; their last tokens stand side by side, padding is in front."""

    def __init__(self, base: PreTrainedModel, draws: int) -> None:
        self.base, self.cache = base, DrawsCache(draws)
        self.mask = torch.zeros(0, 0, dtype=torch.long)  # [R T], 1 where a row has a token
        self._argument = cache_argument(base.forward)

    def __len__(self) -> int:
        return len(self.mask)

    def begin(self, start: Start) -> None:
        """Begin with tokens that all draws have in common."""
        self.mask = start.mask
        self.cache.begin(start, self.cache.draws)

    def extend(self, ids: Int[Tensor, "R T"], mask: Int[Tensor, "R T"] | None = None) -> Float[Tensor, "R 1 V"]:
        """Run the next tokens of all rows, and return the logits of the last; a mask has 0 where there is padding."""
        new = torch.ones_like(ids) if mask is None else mask
        self.mask = torch.cat([self.mask, new], 1) if len(self) else new
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits: Tensor = self.base(
            input_ids=ids, attention_mask=self.mask, position_ids=positions, use_cache=True, logits_to_keep=1,
            **{self._argument: self.cache},
        ).logits  # fmt: skip
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Keep some rows, in this order, any of them more than once, and what is not padding in all of them."""
        index = torch.tensor(rows, dtype=torch.long, device=self.mask.device)
        self.mask = self.mask[index]
        start = int(self.mask.any(0).int().argmax()) if rows else self.mask.shape[1]
        self.mask = self.mask[:, start:]
        self.cache.reorder_cache(index)
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, start:], layer.values[:, :, start:]

    def join(self, others: Rows) -> None:
        """Add other rows after these."""
        if not len(self):
            self.mask, self.cache = others.mask, others.cache
            return
        width = max(self.mask.shape[1], others.mask.shape[1])
        for layer, other in zip(self.cache.layers, others.cache.layers, strict=True):
            layer.keys = self._joined(layer.keys, other.keys, width)
            layer.values = self._joined(layer.values, other.values, width)
        masks = [nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in (self.mask, others.mask)]
        self.mask = torch.cat(masks)

    def _joined(self, mine: Tensor, theirs: Tensor, width: int) -> Tensor:
        """Return keys or values of both, draw after draw, with padding in front."""
        padded = [nn.functional.pad(part, (0, 0, width - part.shape[2], 0)) for part in (mine, theirs)]
        return torch.cat([part.view(self.cache.draws, -1, *part.shape[1:]) for part in padded], 1).flatten(0, 1)


def joins(model: nn.Module) -> bool:
    """Say whether rows may join and leave a batch of this model: what it keeps is keys and values of each token."""
    return tried(model, "joins", partial(_joins_alike, model))


@torch.inference_mode()
def _joins_alike(model: nn.Module) -> bool:
    """Compare rows that join and leave with passes of each row alone."""
    base = require_lora(model).get_base_model()
    if base.config.is_encoder_decoder:
        return False
    kept = {type(layer) for layer in DynamicCache(config=base.config).layers}
    if not kept or not kept <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return False
    most = min(len(base.get_input_embeddings().weight), 1000)
    first, second = torch.randint(0, most, (2, 6), generator=generator("joins")).to(device_of(model))
    with evaluating(model):
        alone = [base(input_ids=ids[None], use_cache=False).logits[0, -1] for ids in (first, second[:3], second[:4])]
        rows, others = Rows(base, 1), Rows(base, 1)
        rows.extend(first[None, :5])
        others.extend(second[None, :2])
        rows.join(others)
        together = [*rows.extend(torch.stack([first[5:], second[2:3]]))[:, -1]]
        rows.keep([1])
        together.append(rows.extend(second[None, 3:4])[0, -1])
    apart = (alone[0] - alone[1]).abs().max()
    return bool((torch.stack(together) - torch.stack(alone)).abs().max() <= _CLOSE * apart)
