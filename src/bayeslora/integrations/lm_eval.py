"""The LM evaluation harness (lm-eval) on a posterior, and how well its multiple-choice answers are calibrated.

A request for a likelihood is answered by log (1/S) Σ_k p_k(text | context): each draw scores the whole text, and the
likelihoods are averaged, as `bayeslora.predict` averages probabilities. Where token by token averages are meant, in
``is_greedy`` and in generated text, each token's distribution is (1/S) Σ_k p_k(token | all before it).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayeslora._typing import Bool, Float, Tokenizer
from bayeslora.errors import InputError, close_matches
from bayeslora.integrations.lm_eval_calibration import Results, add_calibration
from bayeslora.params import evaluating
from bayeslora.posteriors import Draws, Posterior
from bayeslora.posteriors.sampling import former_keywords
from bayeslora.posteriors.transforms import requested
from bayeslora.prediction.encoding import tokenizer_of
from bayeslora.prediction.generation import generate
from bayeslora.prediction.generation.decoding import Settings
from bayeslora.prediction.likelihoods import Likelihoods, Pair
from bayeslora.prediction.memory import default_token_budget, draws_for
from bayeslora.prediction.passes import weight_draws
from bayeslora.prediction.readouts import readout_for
from bayeslora.prediction.stacking import differing
from bayeslora.tasks.types import Format, Split

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as missing:
    raise InputError("the evaluation harness needs lm-eval: pip install 'bayeslora[lm-eval]'") from missing

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and text, where they are known, and the tokens of both."""

__all__ = ["PosteriorLM", "add_calibration", "evaluate_tasks", "find_tasks"]


@final
class PosteriorLM(HFLM):
    """A language model of the harness that answers with the average of a posterior's draws.

    Args:
        model: PEFT model, a causal language model. It is unchanged after every request.
        posterior: What was learned.
        draws: Number S of draws, 0 for one pass at the mean, or `Draws`, whose seed is also that of the tokens where a
            task samples.
        tokenizer: The model's tokenizer; None loads the one that was saved with the model.
        token_budget: Most tokens of a batch over all draws in it; None for what is fast and fits into memory.
        max_length: Most tokens that the model is given; None for its own limit. Longer contexts lose their beginning.
        progress: Whether to show bars.

    Raises:
        InputError: If the posterior's draws are no weights, or the posterior and the model do not fit together.
    """

    @former_keywords(seed="draws.seed", sampling="draws.sampling")
    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior,
        draws: int | Draws = 10,
        *,
        tokenizer: Tokenizer | None = None,
        token_budget: int | None = None,
        max_length: int | None = None,
        progress: bool = False,
    ) -> None:
        posterior, draws = requested(posterior, draws, scaled=False)
        draws = weight_draws(model, posterior, draws)
        tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model)
        readout = readout_for(model, Split("lm-eval", (), Format("", "likelihood")), tokenizer)
        with evaluating(model):
            super().__init__(pretrained=model, tokenizer=tokenizer, max_length=max_length)
        if self.backend != "causal":
            raise InputError("an encoder-decoder cannot be scored here; load a causal language model")
        there = draws_for(model, posterior)
        weights = [there.cached_draw(k, draws) for k in range(draws.count)]
        weights = weights if differing(weights) else weights[:1]
        self.posterior, self.draws, self.seed, self.sampling = posterior, draws.count, draws.seed, draws.sampling
        self.progress = progress
        budget = token_budget or default_token_budget(model)
        self._likelihoods = Likelihoods(model, weights, readout, budget, there.before_answer)

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score texts by the log of the draws' mean likelihood, and keep the answers in the harness's cache."""
        log_p, greedy = self.draw_log_likelihoods([request[1:] for request in requests], disable_tqdm)
        answers = list(zip(_log_mean(log_p).tolist(), greedy.tolist(), strict=True))
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log of the draws' mean likelihood of whole texts, long ones over all the harness's windows."""
        windows: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            windows += map(make_disjoint_window, pairs)
            owners += [number] * (len(windows) - len(owners))
        log_p, _ = self.draw_log_likelihoods(windows, disable_tqdm)
        sums = torch.zeros(len(log_p), len(requests), dtype=torch.float64)
        answers: list[float] = _log_mean(sums.index_add(1, torch.tensor(owners, dtype=torch.long), log_p)).tolist()
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return texts by `bayeslora.generate` with a task's settings, without the stop strings that they end at."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate", disable=disable_tqdm or not self.progress) as bar:
            for numbers in groups.values():
                settings = _generate_settings(requests[numbers[0]].args[1], self.max_gen_toks)
                texts = self._texts([requests[number].args[0] for number in numbers], settings, bar.update)
                for number, answers[number] in zip(numbers, texts, strict=True):
                    self.cache_hook.add_partial("generate_until", requests[number].args, answers[number])
        return answers

    def draw_log_likelihoods(
        self, pairs: Sequence[Pair], disable_tqdm: bool = False
    ) -> tuple[Float[Tensor, "S N"], Bool[Tensor, " N"]]:
        """Return log-likelihoods, and whether the average would write a text; long contexts lose their beginning."""
        shortened = []
        for context, text in pairs:
            if not 0 < len(text) <= self.max_length:
                raise InputError(
                    f"a text to be scored has {len(text)} tokens, and the model reads 1 to {self.max_length}; leave it "
                    "out of the task"
                )
            shortened.append((context[-(self.max_length + 1 - len(text)) :], text))
        with tqdm(total=len(pairs), desc="score", disable=disable_tqdm or not self.progress) as bar:
            return self._likelihoods.of(shortened, bar.update)

    def _texts(self, contexts: Sequence[str], settings: Settings, done: Callable[[int], object]) -> list[str]:
        """Return a text for each context; a context that comes again has the same text unless texts are sampled."""
        counts, sampled = Counter(contexts), settings["do_sample"]
        texts: dict[str, Iterator[str]] = {}
        for times in sorted(set(counts.values())) if sampled else [1]:
            group = [context for context in counts if not sampled or counts[context] == times]
            answers = generate(
                self.model, self.posterior, [self._prompt(context, settings["max_new_tokens"]) for context in group],
                Draws(self.draws, self.seed, self.sampling), tokenizer=self.tokenizer,
                batch_size=1 if times > 1 else None, num_return_sequences=times, **settings,
            )  # fmt: skip
            for k, context in enumerate(group):
                written = [answer.text for answer in answers[k * times : (k + 1) * times]]
                texts[context] = iter(written) if sampled else repeat(written[0])
                done(counts[context])
        return [next(texts[context]) for context in contexts]

    def _prompt(self, text: str, new_tokens: int) -> str:
        """Return a context that leaves room for new tokens, and opens with no more than one special token."""
        room = self.max_length - new_tokens
        if room < 1:
            raise InputError(f"the task asks for {new_tokens} new tokens, and the model reads {self.max_length} in all")
        opening = self.tokenizer.bos_token
        if opening and self.tokenizer(text)["input_ids"][:2] == [self.tokenizer.bos_token_id] * 2:
            text = text.removeprefix(opening)
        ids, size = self.tokenizer(text)["input_ids"], room
        while len(self.tokenizer(text)["input_ids"]) > room:  # what is cut may become other tokens than before
            text = self.tokenizer.decode(ids[len(ids) - size :])
            size -= 1
        return text


def find_tasks(names: Sequence[str], include_path: str = "") -> tuple[list[str], TaskManager]:
    """Return the harness's tasks, groups and tags that some names or patterns stand for.

    Args:
        names: Names, or patterns such as ``mmlu_*``.
        include_path: Folder with tasks of one's own. Where it has them all, the harness's own are not read.

    Returns:
        The names, and the harness's task manager that knows them.

    Raises:
        InputError: If there is no such folder, no name, or an unknown one.
    """
    if include_path and not Path(include_path).is_dir():
        raise InputError(f"there is no folder {include_path} with tasks")
    if not names:
        raise InputError("name at least one task, such as arc_easy")
    manager = TaskManager(include_path=include_path or None, include_defaults=not include_path)
    if include_path and not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=include_path)
    matches = {name: manager.match_tasks([name]) for name in names}
    for name, tasks in matches.items():
        if not tasks:
            hint = close_matches(name, manager.all_tasks, "lm-eval ls tasks lists them")
            raise InputError(f"the evaluation harness has no task {name!r}; {hint}")
    return list(dict.fromkeys(task for tasks in matches.values() for task in tasks)), manager


def evaluate_tasks(
    lm: PosteriorLM,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    manager: TaskManager | None = None,
    **settings: object,
) -> Results:
    """Run tasks of the harness, and add to its results how well multiple-choice answers are calibrated.

    The harness seeds Python's, numpy's and torch's own generators, on which the examples of some tasks depend.

    Args:
        lm: The model.
        tasks: Names of tasks, groups or tags, or patterns.
        limit: Most examples of each task; None for all.
        num_fewshot: Solved examples in each prompt; None for the task's own number.
        manager: The task manager that knows them, as `find_tasks` gives it; None for the harness's own.
        **settings: Any other argument of `lm_eval.simple_evaluate`.

    Returns:
        The harness's results with what `add_calibration` adds.
    """
    names, manager = find_tasks(tasks) if manager is None else (list(tasks), manager)
    results = simple_evaluate(
        model=lm, tasks=names, limit=limit, num_fewshot=num_fewshot, task_manager=manager, **settings
    )
    origin = lm.posterior.origin
    trained = (None if origin is None else origin.normalisation) or "sum"
    return add_calibration(results, normalisation=trained, tokens=lambda *pair: len(lm._encode_pair(*pair)[1]))


def _log_mean(log_p: Float[Tensor, "S N"]) -> Float[Tensor, " N"]:
    """Return the log of the mean over the draws."""
    return log_p.logsumexp(0) - math.log(len(log_p))


def _generate_settings(task_settings: Settings, default_length: int) -> Settings:
    """Return a task's settings of generation by the names that `bayeslora.generate` has for them."""
    settings = dict(task_settings)
    until = settings.pop("until", None) or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    lengths = [settings.pop(f"max_{name}", None) for name in ("gen_toks", "new_tokens", "tokens", "completion_tokens")]
    length = next((int(length) for length in lengths if length is not None), default_length)
    temperature = settings.pop("temperature", None)
    sampled = settings.pop("do_sample", None)
    sampled = temperature != 0 if sampled else sampled is None and float(temperature or 0) > 0
    if sampled and temperature is not None:
        settings["temperature"] = float(temperature)
    return {**settings, "do_sample": sampled, "stop_strings": stops or None, "max_new_tokens": length}
