"""Generation from a posterior on transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from bayeslora._typing import Tokenizer
from bayeslora.errors import InputError
from bayeslora.params import require_lora
from bayeslora.posteriors import Draws, Posterior
from bayeslora.posteriors.sampling import former_keywords
from bayeslora.posteriors.transforms import requested
from bayeslora.prediction.encoding import tokenizer_of
from bayeslora.prediction.generation.answers import Answer, Answers
from bayeslora.prediction.generation.decoding import Decoder, OnStep, Settings
from bayeslora.prediction.generation.semantic import Equivalence
from bayeslora.prediction.memory import default_token_budget, draws_for
from bayeslora.prediction.passes import weight_draws

Prompt = str | Sequence[dict[str, str]]
"""A text, or the messages of a chat, which go through the tokenizer's chat template."""


@former_keywords(seed="draws.seed", sampling="draws.sampling")
def generate(
    model: nn.Module,
    posterior: Posterior,
    prompts: Sequence[Prompt],
    draws: int | Draws = 10,
    *,
    tokenizer: Tokenizer | None = None,
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
        draws: Number S of draws, 0 for the mean, or `Draws`, whose seed is also that of the tokens where
            ``do_sample=True``.
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
    decoder = _decoder(model, posterior, draws, True, tokenizer, {"max_new_tokens": max_new_tokens, **settings})
    return [answer for answers in _answered(decoder, prompts, batch_size, on_step) for answer in answers]


@former_keywords(seed="draws.seed", sampling="draws.sampling")
def generate_each(
    model: nn.Module,
    posterior: Posterior,
    prompts: Sequence[Prompt],
    draws: int | Draws = 10,
    *,
    tokenizer: Tokenizer | None = None,
    max_new_tokens: int = 128,
    batch_size: int | None = None,
    same: Equivalence | None = None,
    **settings: Any,
) -> list[Answers]:
    """Return one answer a draw to each prompt, and which of them mean the same.

    The arguments are those of `generate`, beams apart, and ``same``: whether two texts mean the same (`by_entailment`,
    `by_embedding`, or any function; None for word for word).

    Returns:
        The answers to each prompt: ``num_return_sequences`` for each draw, draw after draw.

    Raises:
        InputError: See `generate`.
    """
    if settings.get("num_beams", 1) > 1:
        raise InputError("beams keep the best text of the average; for one answer a draw leave num_beams at 1")
    decoder = _decoder(model, posterior, draws, False, tokenizer, {"max_new_tokens": max_new_tokens, **settings})
    numbers = tuple(k for k in range(len(decoder.draws)) for _ in range(settings.get("num_return_sequences", 1)))
    return [Answers.of(tuple(answers), numbers, same) for answers in _answered(decoder, prompts, batch_size)]


def _decoder(
    model: nn.Module,
    posterior: Posterior,
    draws: int | Draws,
    average: bool,
    tokenizer: Tokenizer | None,
    settings: Settings,
) -> Decoder:
    """Return a model that generates under draws of weights."""
    posterior, draws = requested(posterior, draws, scaled=False)
    base = require_lora(model).get_base_model()
    if base.get_output_embeddings() is None:
        raise InputError(f"a {type(base).__name__} cannot generate; load a causal language model")
    draws = weight_draws(model, posterior, draws)
    posterior = draws_for(model, posterior)
    weights = [posterior.cached_draw(k, draws) for k in range(draws.count)]
    tokenizer = tokenizer or tokenizer_of(model)
    return Decoder(model, weights, average, tokenizer, settings, draws.seed, posterior.before_answer)


def _answered(
    decoder: Decoder, prompts: Sequence[Prompt], size: int | None, on_step: OnStep | None = None
) -> list[list[Answer]]:
    """Return the answers to each prompt, generated in batches of a size, or of what the token budget holds."""
    longest = decoder.settings["max_new_tokens"]
    if longest < 1:
        raise InputError(f"max_new_tokens must be at least 1, and it is {longest}")
    if size is not None and size < 1:
        raise InputError(f"batch_size must be at least 1, and it is {size}")
    encoded = []
    for number, prompt in enumerate(prompts):
        try:
            encoded.append(prompt_ids(decoder.model, decoder.tokenizer, prompt, longest))
        except InputError as error:
            raise InputError(f"prompt {number} {error}") from error
    if size is None:
        rows = len(decoder.draws) * max(1, int(decoder.settings.get("num_beams", 1)))
        tokens = max((len(ids) for ids in encoded), default=0) + longest
        size = max(1, default_token_budget(decoder.model) // (rows * tokens))
    return decoder.in_batches(encoded, size, on_step)


def prompt_ids(
    model: nn.Module, tokenizer: Tokenizer, prompt: Prompt, longest: int, most: int | None = None
) -> list[int]:
    """Return a prompt's token ids, which leave room for the longest answer; errors lack their subject, the prompt."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
    elif tokenizer.chat_template is None:
        raise InputError("is a chat, and the tokenizer has no chat template; give a text, or set the template")
    else:
        ids = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    return check_room(model, ids, longest, most)


def check_room(model: nn.Module, ids: Sequence[int], longest: int, most: int | None = None) -> list[int]:
    """Return a prompt's token ids if the model has room for them and the longest answer, and so has a limit."""
    if not ids:
        raise InputError("is empty; give it at least one token")
    own = getattr(require_lora(model).get_base_model().config.get_text_config(), "max_position_embeddings", None)
    rooms = [(limit, whose) for limit, whose in ((own, "model"), (most, "server")) if limit is not None]
    room, whose = min(rooms, default=(None, ""))
    if room is not None and len(ids) + longest > room:
        raise InputError(
            f"has {len(ids)} tokens, and with {longest} new ones more than the {whose}'s {room}; shorten it or lower "
            "max_new_tokens"
        )
    return list(ids)
