"""The LM evaluation harness (lm-eval) on a posterior, and how well its multiple-choice answers are calibrated.

A request for a likelihood is answered by log (1/S) Σ_k p_k(text | context): each draw scores the whole text, and the
likelihoods are averaged, as `bayeslora.predict` averages probabilities. Where token by token averages are meant, in
``is_greedy`` and in generated text, each token's distribution is (1/S) Σ_k p_k(token | all before it).
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.integrations.lm_eval_calibration import add_calibration
from bayeslora.params import evaluating
from bayeslora.posteriors import Draws, Posterior
from bayeslora.posteriors.sampling import former_keywords
from bayeslora.prediction.draws import weight_draws
from bayeslora.prediction.encoding import tokenizer_of
from bayeslora.prediction.generation import generate
from bayeslora.prediction.likelihoods import Likelihoods, Pair
from bayeslora.prediction.memory import default_token_budget
from bayeslora.prediction.readouts import readout_for
from bayeslora.prediction.stacking import differing
from bayeslora.tasks.types import Format, Split

try:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as missing:
    raise InputError("the evaluation harness needs lm-eval: pip install 'bayeslora[lm-eval]'") from missing

__all__ = ["PosteriorLM", "add_calibration", "evaluate_tasks", "find_tasks"]


@final
class PosteriorLM(HFLM):
    """A language model of the harness that answers with the average of a posterior's draws.

    Args:
        model: PEFT model, a causal language model. It is unchanged after every request.
        posterior: What was learned; `Point(posterior.mean)` for one pass at the mean.
        draws: Number S of draws, or `Draws`, whose seed is also that of the tokens where a task samples.
        tokenizer: The model's tokenizer; None loads the one that was saved with the model.
        token_budget: Most tokens of a batch over all draws in it; None for what is fast and fits into memory.
        max_length: Most tokens that the model is given; None for its own limit. Longer contexts lose their beginning.
        progress: Whether to show bars.

    Raises:
        InputError: If the posterior's draws are no weights, or the posterior and the model do not fit together.
    """

    @former_keywords("draws", Draws, seed="seed", sampling="sampling")
    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior,
        draws: int | Draws = 10,
        *,
        tokenizer: Any = None,
        token_budget: int | None = None,
        max_length: int | None = None,
        progress: bool = False,
    ) -> None:
        draws = weight_draws(model, posterior, draws)
        tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model)
        readout = readout_for(model, Split("lm-eval", (), Format("", "likelihood")), tokenizer)
        with evaluating(model):
            super().__init__(pretrained=model, tokenizer=tokenizer, max_length=max_length)
        if self.backend != "causal":
            raise InputError("an encoder-decoder cannot be scored here; load a causal language model")
        drawn = [posterior.cached_draw(k, draws) for k in range(draws.count)]
        drawn = drawn if differing(drawn) else drawn[:1]
        self.posterior, self.draws, self.seed, self.sampling = posterior, draws.count, draws.seed, draws.sampling
        self.progress = progress
        self._likelihoods = Likelihoods(model, drawn, readout, token_budget or default_token_budget(model))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score texts after their contexts.

        Args:
            requests: The harness's requests, each with a context and a text.
            disable_tqdm: Whether to show no bar.

        Returns:
            The log of the draws' mean likelihood of each text, and whether the text is what the average of the draws
            would have written.
        """
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self.progress)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score texts that are tokens already, and keep the answers in the harness's cache."""
        found, greedy = self._scored([request[1:] for request in requests], disable_tqdm)
        answers = list(zip(_log_mean(found).tolist(), greedy.tolist(), strict=True))
        for (words, _, _), answer in zip(requests, answers, strict=True):
            if words is not None:
                self.cache_hook.add_partial("loglikelihood", words, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts; one that is longer than the model is read in windows, as the harness does.

        Args:
            requests: The harness's requests, each with a text.
            disable_tqdm: Whether to show no bar.

        Returns:
            The log of the draws' mean likelihood of each text, over all its windows.
        """
        windows: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            own = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            windows += map(make_disjoint_window, own)
            owners += [number] * (len(windows) - len(owners))
        found, _ = self._scored(windows, disable_tqdm)
        sums = torch.zeros(len(found), len(requests), dtype=torch.float64)
        answers: list[float] = _log_mean(sums.index_add(1, torch.tensor(owners, dtype=torch.long), found)).tolist()
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Write texts by `bayeslora.generate`: each token comes from the average of the draws.

        Args:
            requests: The harness's requests, each with a context and settings: ``until``, ``max_gen_toks``,
                ``do_sample``, ``temperature``, and any other argument of transformers' ``generate``.
            disable_tqdm: Whether to show no bar.

        Returns:
            The texts, without what they end at.
        """
        asked: dict[str, tuple[Mapping[str, Any], Counter[str]]] = {}
        for request in requests:
            context, settings = request.args
            key = json.dumps(settings, sort_keys=True, default=str)
            asked.setdefault(key, (settings, Counter()))[1][context] += 1
        written: dict[tuple[str, str], Iterator[str]] = {}
        with tqdm(total=len(requests), desc="generate", disable=disable_tqdm or not self.progress) as bar:
            for key, (settings, counts) in asked.items():
                chosen = _settings(settings, self.max_gen_toks)
                for context, texts in self._written(counts, chosen):
                    bar.update(counts[context])
                    written[key, context] = iter(texts)
        answers = []
        for request in requests:
            context, settings = request.args
            answers.append(next(written[json.dumps(settings, sort_keys=True, default=str), context]))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _scored(self, pairs: Sequence[Pair], disable_tqdm: bool) -> tuple[Tensor, Tensor]:
        """Return the log-likelihoods [S N] of texts, and whether they are greedy; contexts lose what is too long."""
        cut = []
        for context, text in pairs:
            if not 0 < len(text) <= self.max_length:
                raise InputError(
                    f"a text to be scored has {len(text)} tokens, and the model reads 1 to {self.max_length}; leave it "
                    "out of the task"
                )
            cut.append((context[-(self.max_length + 1 - len(text)) :], text))
        with tqdm(total=len(pairs), desc="score", disable=disable_tqdm or not self.progress) as bar:
            return self._likelihoods.of(cut, bar.update)

    def _written(self, counts: Counter[str], settings: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
        """Yield the texts of each context, as many as it is asked for: all the same unless they are sampled."""
        sampled = settings["do_sample"]
        for times in sorted(set(counts.values())) if sampled else [1]:
            own = [context for context in counts if not sampled or counts[context] == times]
            prompts = [self._prompt(context, settings["max_new_tokens"]) for context in own]
            answers = generate(
                self.model, self.posterior, prompts, Draws(self.draws, self.seed, self.sampling),
                tokenizer=self.tokenizer, batch_size=1 if times > 1 else None, num_return_sequences=times, **settings,
            )  # fmt: skip
            for k, context in enumerate(own):
                texts = [answer.text for answer in answers[k * times : (k + 1) * times]]
                yield context, texts if sampled else texts * counts[context]

    def _prompt(self, text: str, longest: int) -> str:
        """Return a context that leaves room for new tokens, and opens with no more than one special token."""
        room = self.max_length - longest
        if room < 1:
            raise InputError(f"the task asks for {longest} new tokens, and the model reads {self.max_length} in all")
        opening = self.tokenizer.bos_token
        if opening and self.tokenizer(text)["input_ids"][:2] == [self.tokenizer.bos_token_id] * 2:
            text = text.removeprefix(opening)
        ids, size = self.tokenizer(text)["input_ids"], room
        while len(self.tokenizer(text)["input_ids"]) > room:  # what is cut may become other tokens than before
            text = self.tokenizer.decode(ids[len(ids) - size :])
            size -= 1
        return text


def find_tasks(names: Sequence[str], include_path: str = "") -> tuple[list[str], Any]:
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
    found = {name: manager.match_tasks([name]) for name in names}
    for name, own in found.items():
        if not own:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "lm-eval ls tasks lists them"
            raise InputError(f"the evaluation harness has no task {name!r}; {hint}")
    return list(dict.fromkeys(task for own in found.values() for task in own)), manager


def evaluate_tasks(
    lm: PosteriorLM,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    manager: Any = None,
    **settings: Any,
) -> dict[str, Any]:
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


def _settings(asked: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Return a task's settings of generation by the names that `bayeslora.generate` has for them."""
    given = dict(asked)
    until = given.pop("until", None) or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    lengths = [given.pop(f"max_{name}", None) for name in ("gen_toks", "new_tokens", "tokens", "completion_tokens")]
    temperature = given.pop("temperature", None)
    sampled = given.pop("do_sample", None)
    sampled = temperature != 0 if sampled else sampled is None and float(temperature or 0) > 0
    warmth = {"temperature": float(temperature)} if sampled and temperature is not None else {}
    most = next((int(length) for length in lengths if length is not None), longest)
    return {**given, **warmth, "do_sample": sampled, "stop_strings": stops or None, "max_new_tokens": most}
