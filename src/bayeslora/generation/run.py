"""Generation from a posterior on transformers' own ``generate``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from bayeslora._typing import Float, Int
from bayeslora.engine.draws import kept_draw
from bayeslora.engine.encode import tokenizer_of
from bayeslora.engine.memory import found_budget
from bayeslora.errors import InputError
from bayeslora.generation.answers import Answer, Answers
from bayeslora.generation.averaged import Averager, DrawsCache, answering
from bayeslora.generation.groups import Same
from bayeslora.operations import draw_count
from bayeslora.origin import check_base
from bayeslora.params import Params, device_of, require_lora, seed_of
from bayeslora.posteriors import Posterior, Sampling, Scaled, has_weights

Prompt = str | Sequence[dict[str, str]]
"""A text, or the messages of a chat, which go through the tokenizer's chat template."""
ALTERNATIVES = 5
"""How many of the most probable tokens are kept in the place of each."""


@final
@dataclass(frozen=True)
class Step:
    """One token of each row, as it is generated.

    Attributes:
        token_ids: The R rows' tokens.
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


def generate(
    model: nn.Module,
    posterior: Posterior,
    prompts: Sequence[Prompt],
    draws: int = 10,
    *,
    seed: int = 0,
    sampling: Sampling = "independent",
    tokenizer: Any = None,
    max_new_tokens: int = 128,
    batch_size: int | None = None,
    on_step: OnStep | None = None,
    **settings: Any,
) -> list[Answer]:
    """Return an answer to each prompt, every token of it taken from the average of the draws' distributions.

    Each draw is the same weights from the first token to the last, and keeps its own keys and values. The rows of a
    batch are those of transformers' ``generate``, so that its settings mean what they always mean.

    Args:
        model: PEFT model, a causal language model. It is unchanged afterwards.
        posterior: What was learned.
        prompts: Texts, or messages with ``role`` and ``content``.
        draws: Number S of draws; see `bayeslora.predict`.
        seed: Which stream of draws, and of tokens where ``do_sample=True``.
        sampling: How the draws belong together.
        tokenizer: The model's tokenizer; None loads the one that was saved with the model.
        max_new_tokens: Most tokens of an answer.
        batch_size: Prompts at once; None for as many as the token budget holds.
        on_step: Told of each token as it is generated, with the rows of its batch; not with beams.
        **settings: Any argument of transformers' ``generate``: ``do_sample``, ``temperature``, ``top_p``,
            ``num_beams``, ``num_return_sequences``, ``repetition_penalty``, ``stop_strings``, ``streamer``, …

    Returns:
        The answers, ``num_return_sequences`` for each prompt, in order.

    Raises:
        InputError: If a prompt is empty or too long, the posterior's draws are no weights, or a setting is unknown.
    """
    drawn = _draws(model, posterior, draws, seed, sampling)
    run = _Run(model, drawn, True, tokenizer or tokenizer_of(model), max_new_tokens, seed, on_step, settings)
    return [answer for group in run.groups(prompts, batch_size) for answer in run.answers(group)]


def generate_each(
    model: nn.Module,
    posterior: Posterior,
    prompts: Sequence[Prompt],
    draws: int = 10,
    *,
    seed: int = 0,
    sampling: Sampling = "independent",
    tokenizer: Any = None,
    max_new_tokens: int = 128,
    batch_size: int | None = None,
    same: Same | None = None,
    **settings: Any,
) -> list[Answers]:
    """Return one answer a draw to each prompt, and which of them say the same.

    Args:
        model: See `generate`.
        posterior: See `generate`.
        prompts: See `generate`.
        draws: See `generate`.
        seed: See `generate`.
        sampling: See `generate`.
        tokenizer: See `generate`.
        max_new_tokens: See `generate`.
        batch_size: See `generate`.
        same: Whether two texts say the same: `by_entailment`, `by_embedding`, or any function; None for word for word.
        **settings: See `generate`; beams are not for answers that belong to draws.

    Returns:
        The answers to each prompt: ``num_return_sequences`` for each draw, draw after draw.

    Raises:
        InputError: See `generate`.
    """
    if settings.get("num_beams", 1) > 1:
        raise InputError("beams keep the best text of the average; for one answer a draw leave num_beams at 1")
    drawn = _draws(model, posterior, draws, seed, sampling)
    run = _Run(model, drawn, False, tokenizer or tokenizer_of(model), max_new_tokens, seed, None, settings)
    found = []
    each = settings.get("num_return_sequences", 1)
    numbers = tuple(k for k in range(len(drawn)) for _ in range(each))
    for group in run.groups(prompts, batch_size):
        rows = run.answers(group)
        for b in range(len(group)):
            own = tuple(rows[(k * len(group) + b) * each + i] for k in range(len(drawn)) for i in range(each))
            found.append(Answers.of(own, numbers, same))
    return found


def _draws(model: nn.Module, posterior: Posterior, count: int, seed: int, sampling: Sampling) -> list[Params]:
    """Return draws of weights, or refuse."""
    base = require_lora(model).get_base_model()
    if base.get_output_embeddings() is None:
        raise InputError(f"a {type(base).__name__} cannot generate; load a causal language model")
    if not has_weights(posterior):
        raise InputError(
            f"the draws of a {type(posterior).__name__} are not weights that stay the same from token to token; "
            "generate from its mean, Point(posterior.mean), or from another posterior"
        )
    if isinstance(posterior, Scaled):
        raise InputError(
            "a temperature was fitted to the choices of a task and says nothing about tokens; generate from what is "
            "scaled, posterior.posterior"
        )
    if posterior.origin is not None:
        check_base(posterior.origin, model)
    return [kept_draw(posterior, k, seed, sampling) for k in range(draw_count(posterior, count))]


@final
@dataclass(frozen=True)
class _Run:
    """A generation: model, draws and settings.

    Attributes:
        model: PEFT model.
        drawn: The draws.
        average: Whether they are averaged at each token, or have an answer each.
        tokenizer: The model's tokenizer.
        longest: Most new tokens.
        seed: Seed of the tokens.
        on_step: Told of each token.
        settings: Arguments of transformers' ``generate``.
    """

    model: nn.Module
    drawn: list[Params]
    average: bool
    tokenizer: Any
    longest: int
    seed: int
    on_step: OnStep | None
    settings: dict[str, Any]

    def groups(self, prompts: Sequence[Prompt], size: int | None) -> list[list[list[int]]]:
        """Return the prompts' token ids in batches, in order."""
        if self.longest < 1:
            raise InputError(f"max_new_tokens must be at least 1, and it is {self.longest}")
        if size is not None and size < 1:
            raise InputError(f"batch_size must be at least 1, and it is {size}")
        encoded = [self._ids(number, prompt) for number, prompt in enumerate(prompts)]
        if size is None:
            rows = len(self.drawn) * max(1, int(self.settings.get("num_beams", 1)))
            tokens = max((len(ids) for ids in encoded), default=0) + self.longest
            size = max(1, found_budget(self.model) // (rows * tokens))
        return [encoded[at : at + size] for at in range(0, len(encoded), size)]

    def _ids(self, number: int, prompt: Prompt) -> list[int]:
        """Return a prompt's token ids."""
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
            if ids and ids[-1] == self.tokenizer.eos_token_id and len(ids) > 1:
                ids = ids[:-1]
        elif self.tokenizer.chat_template is None:
            raise InputError(
                "the tokenizer has no chat template; give the prompt as a text, or set tokenizer.chat_template"
            )
        else:
            ids = self.tokenizer.apply_chat_template(
                list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        if not ids:
            raise InputError(f"prompt {number} is empty; give it at least one token")
        base = require_lora(self.model).get_base_model()
        room = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and len(ids) + self.longest > room:
            raise InputError(
                f"prompt {number} has {len(ids)} tokens, and with {self.longest} new ones more than the model's "
                f"{room}; shorten it or lower max_new_tokens"
            )
        return list(ids)

    def answers(self, group: list[list[int]]) -> list[Answer]:
        """Generate for one batch of prompts."""
        base = require_lora(self.model).get_base_model()
        device = device_of(self.model)
        width = max(map(len, group))
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[padding] * (width - len(own)) + own for own in group], device=device)
        mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in group], device=device)
        if not self.average:
            ids, mask = (value.repeat(len(self.drawn), 1) for value in (ids, mask))
        beams = self.settings.get("num_beams", 1) > 1
        cuda = [device] if device.type == "cuda" else []
        with answering(self.model, self.drawn, average=self.average) as averager, torch.random.fork_rng(cuda):
            torch.manual_seed(seed_of("tokens", self.seed))
            notes = _Notes(averager, self.on_step, self._stopped, width)
            settings = {
                "max_new_tokens": self.longest, "pad_token_id": padding, "num_beams": 1, **self.settings,
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
            ends = _ends(base, self.settings)
            lengths = [_length(row[: notes.lengths.get(r)], ends) for r, row in enumerate(new.tolist())]
            steps = _scored(averager, base, ids, mask, new) if beams else notes.steps
        return [self._answer(new[r].tolist()[:n], done, steps, r) for r, (n, done) in enumerate(lengths)]

    def _answer(self, ids: list[int], done: bool, steps: list[Step], row: int) -> Answer:
        """Return what was noted of one row."""
        own = steps[: len(ids)]
        text, place = self._stopped(ids)

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
            alternatives=tuple(
                tuple(
                    (self.tokenizer.decode([i]), math.exp(p))
                    for i, p in zip(s.best[row].tolist(), s.best_log_probs[row].tolist(), strict=True)
                )
                for s in own
            ),
            finished="stop" if done or place is not None else "length",
        )

    def _stopped(self, ids: list[int]) -> tuple[str, int | None]:
        """Return the text of some tokens, and where its first stop string begins."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        stops = self.settings.get("stop_strings") or ()
        places = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop in text]
        return text, min(places, default=None)


@final
class _Notes(StoppingCriteria):
    """Notes what the draws said of each token when it is chosen.

    Args:
        averager: What the model said last.
        on_step: Told of each step.
        stopped: Gives the text of tokens, and where a stop string begins in it.
        width: Tokens of the prompts.

    Attributes:
        steps: What was noted.
        lengths: Tokens of the rows that a stop string ended.
    """

    def __init__(
        self,
        averager: Averager,
        on_step: OnStep | None,
        stopped: Callable[[list[int]], tuple[str, int | None]],
        width: int,
    ) -> None:
        self.averager, self.on_step, self.stopped, self.width = averager, on_step, stopped, width
        self.steps: list[Step] = []
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Note a step; say which rows are to end."""
        self.steps.append(_step(self.averager, input_ids[:, -1]))
        for row, ids in enumerate(input_ids[:, self.width :].tolist()):
            if row not in self.lengths and self.stopped(ids)[1] is not None:
                self.lengths[row] = len(ids)
        if self.on_step is not None and self.on_step(self.steps[-1]):
            return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return torch.tensor([row in self.lengths for row in range(len(input_ids))], device=input_ids.device)


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
    """Return the steps of texts that are there already: they are passed once more, token by token."""
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


def _ends(base: Any, settings: dict[str, Any]) -> set[int]:
    """Return the tokens that end a text."""
    config = settings.get("generation_config") or base.generation_config
    end = settings.get("eos_token_id", config.eos_token_id)
    return set() if end is None else {int(end)} if isinstance(end, int) else {int(e) for e in end}


def _length(ids: list[int], ends: set[int]) -> tuple[int, bool]:
    """Return how many tokens a row has, its end-of-text token included, and whether it has one."""
    place = next((t for t, i in enumerate(ids) if i in ends), None)
    return (len(ids), False) if place is None else (place + 1, True)
