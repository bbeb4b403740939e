"""One batch of prompts through transformers' ``generate`` under several draws, with a note of every token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from bayeslora._typing import Float, Int
from bayeslora.errors import InputError
from bayeslora.params import Params, device_of, require_lora, seed_of
from bayeslora.prediction.generation.answers import Answer
from bayeslora.prediction.generation.averaging import Averager, DrawsCache, answering

ALTERNATIVES = 5
"""How many of the most probable tokens are kept in the place of each."""


@final
@dataclass(frozen=True)
class Step:
    """One token of each row, as it is generated.

    Attributes:
        token_ids: The R rows' tokens; rows that have ended go on with padding.
        log_probs: log p̄ of each.
        draw_log_probs: Each draw's log-probability of it.
        entropy: H(p̄).
        expected_entropy: Mean of the draws' entropies.
        best: Ids of the most probable tokens.
        best_log_probs: Their log p̄.
    """

    token_ids: Int[Tensor, " R"]
    log_probs: Float[Tensor, " R"]
    draw_log_probs: Float[Tensor, "S R"]
    entropy: Float[Tensor, " R"]
    expected_entropy: Float[Tensor, " R"]
    best: Int[Tensor, "R A"]
    best_log_probs: Float[Tensor, "R A"]


OnStep = Callable[[Step], bool | None]
"""Told of each step as it happens; True ends the generation."""
Ended = Callable[[int, list[int]], bool]
"""Given a row's number and its new tokens, says whether the row ends with them."""


@final
@dataclass(frozen=True)
class Decoder:
    """A model under some draws, ready for batches.

    Attributes:
        model: PEFT model, a causal language model.
        drawn: The S draws.
        average: Whether they are averaged at each token; else the rows belong to them in S equal parts.
        tokenizer: The model's tokenizer.
        settings: Arguments of transformers' ``generate``; ``max_new_tokens`` is among them.
        seed: Seed of the tokens, where they are sampled.
    """

    model: nn.Module
    drawn: Sequence[Params]
    average: bool
    tokenizer: Any
    settings: dict[str, Any]
    seed: int = 0

    def answers(
        self, prompts: Sequence[Sequence[int]], ended: Ended | None = None, on_step: OnStep | None = None
    ) -> list[Answer]:
        """Generate for one batch of prompts.

        Args:
            prompts: Token ids of each.
            ended: Says which rows end; None where only the model and ``stop_strings`` do.
            on_step: Told of each step; not with beams.

        Returns:
            The rows' answers, in the order of transformers' ``generate``.

        Raises:
            InputError: If transformers refuses a setting.
        """
        base = require_lora(self.model).get_base_model()
        device = device_of(self.model)
        width = max(map(len, prompts))
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[padding] * (width - len(own)) + [*own] for own in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in prompts], device=device)
        if not self.average:
            ids, mask = (value.repeat(len(self.drawn), 1) for value in (ids, mask))
        beams = self.settings.get("num_beams", 1) > 1
        cuda = [device] if device.type == "cuda" else []
        with answering(self.model, self.drawn, average=self.average) as averager, torch.random.fork_rng(cuda):
            torch.manual_seed(seed_of("tokens", self.seed))
            notes = _Notes(averager, on_step, ended or self._stops, width)
            settings = {
                "pad_token_id": padding, "num_beams": 1, **self.settings,
                "past_key_values": DrawsCache(averager.draws, base.config), "tokenizer": self.tokenizer,
            }  # fmt: skip
            if not beams:
                criteria = [notes, *self.settings.get("stopping_criteria", ())]
                settings = {**settings, "stopping_criteria": StoppingCriteriaList(criteria), "stop_strings": None}
            try:
                found = base.generate(input_ids=ids, attention_mask=mask, **settings)
            except ValueError as error:
                raise InputError(f"transformers' generate refuses: {' '.join(str(error).split())}") from error
            new = found[:, width:].cpu()
            ends = ends_of(base, self.settings)
            lengths = [_length(row[: notes.lengths.get(r)], ends) for r, row in enumerate(new.tolist())]
            steps = _scored(averager, base, ids, mask, new) if beams else notes.steps
        return [self._answer(new[r].tolist()[:n], done, steps, r) for r, (n, done) in enumerate(lengths)]

    def _answer(self, ids: list[int], done: bool, steps: list[Step], row: int) -> Answer:
        """Return what was noted of one row."""
        own = steps[: len(ids)]
        text, place = self.stopped(ids)

        def column(name: str) -> Tensor:
            """Return one number of each step."""
            return torch.stack([getattr(s, name)[..., row] for s in own], -1) if own else torch.zeros(0)

        return Answer(
            text=text[:place],
            token_ids=tuple(ids),
            tokens=tuple(self.tokenizer.decode([i]) for i in ids),
            log_probs=column("log_probs"),
            draw_log_probs=column("draw_log_probs") if own else torch.zeros(len(self.drawn), 0),
            entropy=column("entropy"),
            expected_entropy=column("expected_entropy"),
            alternatives=tuple(alternatives(self.tokenizer, s, row) for s in own),
            finished="stop" if done or place is not None else "length",
        )

    def stopped(self, ids: list[int]) -> tuple[str, int | None]:
        """Return the text of some tokens, and where its first stop string begins.

        Args:
            ids: New tokens of a row.
        """
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        stops = self.settings.get("stop_strings") or ()
        places = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop in text]
        return text, min(places, default=None)

    def _stops(self, row: int, ids: list[int]) -> bool:
        """Say whether a row has come to a stop string."""
        return bool(self.settings.get("stop_strings")) and self.stopped(ids)[1] is not None


def alternatives(tokenizer: Any, step: Step, row: int) -> tuple[tuple[str, float], ...]:
    """Return the most probable tokens in the place of one, with their p̄.

    Args:
        tokenizer: The model's tokenizer.
        step: The step.
        row: The row.
    """
    pairs = zip(step.best[row].tolist(), step.best_log_probs[row].tolist(), strict=True)
    return tuple((tokenizer.decode([i]), math.exp(p)) for i, p in pairs)


def ends_of(base: Any, settings: dict[str, Any]) -> set[int]:
    """Return the tokens that end a text.

    Args:
        base: The base model.
        settings: Arguments of ``generate``.
    """
    config = settings.get("generation_config") or base.generation_config
    end = settings.get("eos_token_id", config.eos_token_id)
    return set() if end is None else {int(end)} if isinstance(end, int) else {int(e) for e in end}


@final
class _Notes(StoppingCriteria):
    """Notes what the draws said of each token when it is chosen.

    Args:
        averager: What the model said last.
        on_step: Told of each step.
        ended: Says which rows end.
        width: Tokens of the prompts.

    Attributes:
        steps: What was noted.
        lengths: Tokens of the rows that have ended by ``ended``.
    """

    def __init__(self, averager: Averager, on_step: OnStep | None, ended: Ended, width: int) -> None:
        self.averager, self.on_step, self.ended, self.width = averager, on_step, ended, width
        self.steps: list[Step] = []
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Note a step; say which rows are to end."""
        self.steps.append(_step(self.averager, input_ids[:, -1]))
        stop = self.on_step is not None and bool(self.on_step(self.steps[-1]))
        for row, ids in enumerate(input_ids[:, self.width :].tolist()):
            if row not in self.lengths and self.ended(row, ids):
                self.lengths[row] = len(ids)
        done = [stop or row in self.lengths for row in range(len(input_ids))]
        return torch.tensor(done, device=input_ids.device)


def _step(averager: Averager, chosen: Int[Tensor, " R"]) -> Step:
    """Return what was said of the tokens that were chosen."""
    entropy, expected = averager.entropies()
    best = averager.average.topk(min(ALTERNATIVES, averager.average.shape[-1]))
    pick = chosen[:, None]
    return Step(
        token_ids=chosen.cpu(),
        log_probs=averager.average.gather(1, pick)[:, 0].cpu(),
        draw_log_probs=averager.log_probs.gather(2, pick.expand(len(averager.log_probs), -1, -1))[..., 0].cpu(),
        entropy=entropy.cpu(),
        expected_entropy=expected.cpu(),
        best=best.indices.cpu(),
        best_log_probs=best.values.cpu(),
    )


@torch.inference_mode()
def _scored(averager: Averager, base: Any, ids: Tensor, mask: Tensor, new: Tensor) -> list[Step]:
    """Return the steps of texts that beams have found: they are passed once more, token by token."""
    each = len(new) // len(ids)
    seen, cache = mask.repeat_interleave(each, 0), DrawsCache(averager.draws, base.config)
    tokens, steps = ids.repeat_interleave(each, 0), []
    for t in range(new.shape[1]):
        positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        base(
            input_ids=tokens, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        tokens = new[:, t : t + 1].to(ids.device)
        steps.append(_step(averager, tokens[:, 0]))
        seen = torch.cat([seen, torch.ones_like(tokens)], 1)
    return steps


def _length(ids: list[int], ends: set[int]) -> tuple[int, bool]:
    """Return how many tokens a row has, its end-of-text token included, and whether it has one."""
    place = next((t for t, i in enumerate(ids) if i in ends), None)
    return (len(ids), False) if place is None else (place + 1, True)
