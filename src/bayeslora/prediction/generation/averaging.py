"""A language model that answers with the average of several draws.

From outside it is a model like any other, so that everything that `transformers` does with a model works. Inside, every
row is there once for each draw, and the keys and values that are kept belong to their draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.params import Params, evaluating, generator, require_lora
from bayeslora.prediction.prefix_cache import REFUSED, Start, start_of
from bayeslora.prediction.stacking import differing, stacked, stacks


@final
class DrawsCache(DynamicCache):
    """Keys and values of every row under each of S draws, draw after draw; without a configuration, of every token."""

    def __init__(self, draws: int, config: PretrainedConfig | None = None) -> None:
        super().__init__(config=config)
        self.draws = draws
        self._copies = 0

    def begin(self, start: Start, copies: int) -> None:
        """Begin with the keys and values of R rows, which are repeated so many times when the first token comes."""
        self._copies = copies
        for number, (keys, values) in enumerate(start.layers):
            super().update(keys, values, number)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add tokens of all rows; each of R rows that it began with is there so many times as the new ones need."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if self._copies and layer is not None and len(layer.keys) < len(key_states):
            each = len(key_states) // (self._copies * len(layer.keys))  # beams, or answers to one prompt
            for name in ("keys", "values"):
                setattr(layer, name, getattr(layer, name).repeat_interleave(each, 0).repeat(self._copies, 1, 1, 1))
        every: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return every

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other rows, the same under every draw, as many as there are or more or fewer."""
        for layer in self.layers:
            count = len(layer.keys) // self.draws if layer.get_seq_length() > 0 else len(beam_idx)
            starts = count * torch.arange(self.draws, device=beam_idx.device)
            layer.reorder_cache((starts[:, None] + beam_idx).flatten())


@final
class Averager:
    """The distributions of the last position, and their average over S draws (1 where every row has its own draw)."""

    def __init__(self, draws: int, start: Callable[[Tensor, Tensor, Start | None], Start] | None = None) -> None:
        self.draws = draws
        self.start = (
            start  # runs R rows' tokens and mask [R T], after others, without noise; None: they have the draws'
        )
        self.log_probs = torch.empty(0)  # of the R rows' next token under each draw [S R V], float32
        self.average = torch.empty(0)  # log p̄ [R V]

    def take(self, logits: Float[Tensor, "SR T V"]) -> Float[Tensor, "R 1 V"]:
        """Keep the last position's log-probabilities, and return their average over the draws."""
        self.log_probs = logits[:, -1].float().log_softmax(-1).view(self.draws, -1, logits.shape[-1])
        self.average = self.log_probs[0] if self.draws == 1 else self.log_probs.logsumexp(0) - math.log(self.draws)
        return self.average[:, None]

    def select(self, rows: Sequence[int]) -> None:
        """Take other rows."""
        index = torch.tensor(rows, device=self.average.device)
        self.log_probs, self.average = self.log_probs[:, index], self.average[index]


@contextmanager
def answering(
    model: nn.Module, draws: Sequence[Params], *, average: bool, before: Params | None = None
) -> Iterator[Averager]:
    """Make a causal language model answer by the average of S draws, or its rows by one each, in S equal parts."""
    # ``before`` are the weights of `Averager.start`; None where prompts have the draws' own.
    base = require_lora(model).get_base_model()
    with evaluating(model):
        names = differing(draws if before is None else [before, *draws])
        if names and not stacks(model, names, partial(_few_answers, base), "generation", needed=True):
            raise InputError(
                "the draws of this adapter cannot share a pass (it has parameters outside of linear layers), so the "
                "model cannot generate from several at once; use draws=1"
            )

        def after(_: nn.Module, args: tuple[object, ...], outputs: ModelOutput) -> ModelOutput:
            """Put the average in the place of the model's logits."""
            outputs.logits = averager.take(outputs.logits)
            return outputs

        with stacked(model, draws, single=before, repeat=average) as stack, base.register_forward_hook(after):

            def start(ids: Tensor, mask: Tensor, begun: Start | None) -> Start:
                """Run tokens without noise."""
                with stack.single(), torch.inference_mode():
                    found = start_of(model, "rows", ids, mask, begun)
                if found is None:
                    raise InputError(REFUSED)
                return found

            averager = Averager(len(draws) if average else 1, None if before is None else start)
            yield averager


@torch.inference_mode()
def _few_answers(base: PreTrainedModel, count: int) -> Float[Tensor, "S 2 V"]:
    """Return a model's log-probabilities of what comes after two short texts, once for each draw."""
    weight = base.get_input_embeddings().weight
    ids = torch.randint(0, min(len(weight), 1000), (2, 5), generator=generator("generation"))
    logits = base(input_ids=ids.to(weight.device), use_cache=False).logits[:, -1]
    return logits.float().log_softmax(-1).view(count, len(ids), -1)
