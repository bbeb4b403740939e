"""One batch of prompts through transformers' ``generate`` under several draws, with a note of every token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.special import entr
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from bayeslora._typing import Float, Int, Tokenizer
from bayeslora.errors import InputError
from bayeslora.models import cache_argument
from bayeslora.params import Params, device_of, require_lora, seed_of
from bayeslora.prediction.generation.answers import Answer
from bayeslora.prediction.generation.averaging import Averager, DrawsCache, answering
from bayeslora.prediction.memory import in_halves
from bayeslora.prediction.prefix_cache import Start

ALTERNATIVES = 5
"""How many of the most probable tokens are kept in the place of each."""


@final
@dataclass(frozen=True)
class Step:
    """One token of each row, as it is generated."""

    token_ids: Int[Tensor, " R"]  # rows that have ended go on with padding
    log_probs: Float[Tensor, " R"]  # log p̄ of each
    draw_log_probs: Float[Tensor, "S R"]  # each draw's log-probability of it
    entropy: Float[Tensor, " R"]  # H(p̄)
    expected_entropy: Float[Tensor, " R"]  # mean of the draws' entropies
    best: Int[Tensor, "R A"]  # ids of the most probable tokens
    best_log_probs: Float[Tensor, "R A"]  # their log p̄


Settings = dict[str, Any]
"""Arguments of transformers' ``generate``."""
OnStep = Callable[[Step], bool | None]
"""Told of each step as it happens; True ends the generation."""
Ended = Callable[[int, list[int]], bool]
"""Given a row's number and its new tokens, says whether the row ends with them."""


@final
@dataclass(frozen=True)
class Decoder:
    """A causal language model under S draws, ready for batches of prompts."""

    model: nn.Module
    draws: Sequence[Params]
    average: bool  # whether draws are averaged at each token; else the rows belong to them in S equal parts
    tokenizer: Tokenizer
    settings: Settings  # with ``max_new_tokens``
    seed: int = 0  # of the tokens, where they are sampled
    before: Params | None = None  # the weights for a prompt but its last token; None: those of each draw

    def in_batches(
        self, prompts: Sequence[Sequence[int]], size: int, on_step: OnStep | None = None
    ) -> list[list[Answer]]:
        """Return the answers to each of the prompts, so many at once, draw after draw where each draw has its own."""
        answers: list[list[Answer]] = [[] for _ in prompts]
        started = False  # a batch that is too large for memory is halved, unless somebody was told of its tokens

        def note(step: Step) -> bool | None:
            """Tell of a step."""
            nonlocal started
            started = on_step is not None
            return on_step(step) if on_step is not None else None

        def run(numbers: Sequence[int]) -> None:
            """Generate for one batch."""
            nonlocal started
            started = False
            rows = self.answers([prompts[n] for n in numbers], on_step=note, first=numbers[0])
            each = len(rows) // (len(numbers) * (1 if self.average else len(self.draws)))  # answers of a draw
            for place, answer in enumerate(rows):
                answers[numbers[place // each % len(numbers)]].append(answer)

        batches = [range(at, min(at + size, len(prompts))) for at in range(0, len(prompts), size)]
        for number in in_halves(run, batches, lambda _: not started):
            raise InputError(
                f"prompt {number} has {len(prompts[number])} tokens and does not fit into memory with its answer; "
                "lower max_new_tokens or draws"
            )
        return answers

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        ended: Ended | None = None,
        on_step: OnStep | None = None,
        *,
        first: int = 0,
    ) -> list[Answer]:
        """Return the rows' answers to one batch of prompts, in the order of transformers' ``generate``.

        ``first`` is the number of the first prompt among all: batches are sampled with numbers of their own.

        Raises:
            InputError: If transformers refuses the settings.
        """
        base = require_lora(self.model).get_base_model()
        device = device_of(self.model)
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids, mask = left_padded(prompts, padding, device)
        width, prompts_alone = ids.shape[1], (ids[:, :-1], mask[:, :-1])
        if not self.average:
            ids, mask = (value.repeat(len(self.draws), 1) for value in (ids, mask))
        beams = self.settings.get("num_beams", 1) > 1
        forked = range(torch.cuda.device_count()) if device.type == "cuda" else []
        with (
            answering(self.model, self.draws, average=self.average, before=self.before) as averager,
            torch.random.fork_rng(forked),
        ):
            cache = DrawsCache(averager.draws, base.config)
            start = averager.start(*prompts_alone, None) if averager.start is not None and width > 1 else None
            if start is not None:
                cache.begin(start, len(self.draws))
            torch.manual_seed(
                seed_of("tokens", self.seed, first)
            )  # transformers samples from the default generators only
            notes = _Notes(averager, on_step, ended or self._stops, width)
            settings = {
                "pad_token_id": padding, "num_beams": 1, **self.settings,
                cache_argument(base.prepare_inputs_for_generation): cache,
                "tokenizer": self.tokenizer,
            }  # fmt: skip
            if not beams:
                criteria = [notes, *self.settings.get("stopping_criteria", ())]
                settings = {**settings, "stopping_criteria": StoppingCriteriaList(criteria), "stop_strings": None}
            try:
                tokens = base.generate(input_ids=ids, attention_mask=mask, **settings)
            except ValueError as error:
                raise InputError(f"transformers' generate refuses: {' '.join(str(error).split())}") from error
            new = tokens[:, width:].cpu()
            ends = ends_of(base, self.settings)
            lengths = [_length(row[: notes.lengths.get(r)], ends) for r, row in enumerate(new.tolist())]
            steps = _scored(averager, base, ids, mask, new, start) if beams else notes.steps
        return [self._answer(new[r].tolist()[:n], done, steps, r) for r, (n, done) in enumerate(lengths)]

    def _answer(self, ids: list[int], done: bool, steps: list[Step], row: int) -> Answer:
        """Return what was noted of one row."""
        noted = steps[: len(ids)]
        text, place = self.stopped(ids)

        def column(name: str) -> Tensor:
            """Return one number of each step."""
            return torch.stack([getattr(s, name)[..., row] for s in noted], -1) if noted else torch.zeros(0)

        return Answer(
            text=text[:place],
            token_ids=tuple(ids),
            tokens=tuple(self.tokenizer.decode([i]) for i in ids),
            log_probs=column("log_probs"),
            draw_log_probs=column("draw_log_probs") if noted else torch.zeros(len(self.draws), 0),
            entropy=column("entropy"),
            expected_entropy=column("expected_entropy"),
            alternatives=tuple(alternatives(self.tokenizer, s, row) for s in noted),
            finished="stop" if done or place is not None else "length",
        )

    def stopped(self, ids: list[int]) -> tuple[str, int | None]:
        """Return the text of a row's new tokens, and where its first stop string starts."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        stops = self.settings.get("stop_strings") or ()
        places = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop in text]
        return text, min(places, default=None)

    def _stops(self, row: int, ids: list[int]) -> bool:
        """Say whether a row has come to a stop string."""
        return bool(self.settings.get("stop_strings")) and self.stopped(ids)[1] is not None


def left_padded(
    prompts: Sequence[Sequence[int]], padding: int, device: torch.device
) -> tuple[Int[Tensor, "R T"], Int[Tensor, "R T"]]:
    """Return prompts as one batch with padding in front, and its mask."""
    width = max(map(len, prompts))
    ids = [[padding] * (width - len(prompt)) + [*prompt] for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device, dtype=torch.long), torch.tensor(mask, device=device, dtype=torch.long)


def alternatives(tokenizer: Tokenizer, step: Step, row: int) -> tuple[tuple[str, float], ...]:
    """Return the most probable tokens in the place of a row's, with their p̄."""
    pairs = zip(step.best[row].tolist(), step.best_log_probs[row].tolist(), strict=True)
    return tuple((tokenizer.decode([i]), math.exp(p)) for i, p in pairs)


def ends_of(base: PreTrainedModel, settings: Settings) -> set[int]:
    """Return the tokens that end a text."""
    config = settings.get("generation_config") or base.generation_config
    end = settings.get("eos_token_id", config.eos_token_id)
    return set() if end is None else {int(end)} if isinstance(end, int) else {int(e) for e in end}


@final
class _Notes(StoppingCriteria):
    """Notes a step for each token when it is chosen, and the lengths of the rows that ``ended`` has ended."""

    def __init__(self, averager: Averager, on_step: OnStep | None, ended: Ended, width: int) -> None:
        self.averager, self.on_step, self.ended, self.width = averager, on_step, ended, width
        self.steps: list[Step] = []
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """Note a step, and return which rows are to end."""
        self.steps.append(step_of(self.averager, input_ids[:, -1]))
        stop = self.on_step is not None and bool(self.on_step(self.steps[-1]))
        for row, ids in enumerate(input_ids[:, self.width :].tolist()):
            if row not in self.lengths and self.ended(row, ids):
                self.lengths[row] = len(ids)
        done = [stop or row in self.lengths for row in range(len(input_ids))]
        return torch.tensor(done, device=input_ids.device)


def step_of(averager: Averager, chosen: Int[Tensor, " R"]) -> Step:
    """Return the draws' distributions at the tokens that were chosen."""
    best = averager.average.topk(min(ALTERNATIVES, averager.average.shape[-1]))
    pick = chosen[:, None].to(averager.average.device)  # which is the head's, and the tokens are where the model begins
    return Step(
        token_ids=chosen.cpu(),
        log_probs=averager.average.gather(1, pick)[:, 0].cpu(),
        draw_log_probs=averager.log_probs.gather(2, pick.expand(len(averager.log_probs), -1, -1))[..., 0].cpu(),
        entropy=entr(averager.average.exp()).sum(-1).cpu(),
        expected_entropy=entr(averager.log_probs.exp()).sum(-1).mean(0).cpu(),
        best=best.indices.cpu(),
        best_log_probs=best.values.cpu(),
    )


@torch.inference_mode()
def _scored(
    averager: Averager, base: PreTrainedModel, ids: Tensor, mask: Tensor, new: Tensor, start: Start | None
) -> list[Step]:
    """Return the steps of texts that beams ended with: they are passed once more, token by token."""
    each = len(new) // len(ids)
    seen, cache = mask.repeat_interleave(each, 0), DrawsCache(averager.draws, base.config)
    tokens, steps = ids.repeat_interleave(each, 0), []
    if start is not None:
        cache.begin(start, averager.draws)
        tokens = tokens[:, -1:]
    for t in range(new.shape[1]):
        positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        base(
            input_ids=tokens, attention_mask=seen, position_ids=positions, use_cache=True, logits_to_keep=1,
            **{cache_argument(base.forward): cache},
        )  # fmt: skip
        tokens = new[:, t : t + 1].to(ids.device)
        steps.append(step_of(averager, tokens[:, 0]))
        seen = torch.cat([seen, torch.ones_like(tokens)], 1)
    return steps


def _length(ids: list[int], ends: set[int]) -> tuple[int, bool]:
    """Return how many tokens a row has, its end-of-text token included, and whether it has one."""
    place = next((t for t, i in enumerate(ids) if i in ends), None)
    return (len(ids), False) if place is None else (place + 1, True)
