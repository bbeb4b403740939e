"""Draws in vLLM's engine in this process: many rows from exported adapters, without a server.

Each row goes to the engine under each adapter, as a `LoRARequest`, and its choices are read from generated tokens as on
a server, see `bayeslora.integrations.openai.scoring`. vLLM is not among this package's requirements, for it pins torch
and transformers: use an environment of vLLM's, in which this package is installed too.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from bayeslora._typing import Tokenizer
from bayeslora.errors import InputError
from bayeslora.files import read_object
from bayeslora.integrations.openai.echo import Query, queries_of_split
from bayeslora.integrations.openai.scoring import Ids, choice_scores, log_likelihoods_of, reads, unique_pairs
from bayeslora.integrations.openai.serving import GROUP, VLLM_RANKS, max_rank, plain_modules, refusals, served_name
from bayeslora.metrics.prediction import Prediction
from bayeslora.posteriors.folder import ADAPTER_CONFIG
from bayeslora.prediction.generation.answers import Answer
from bayeslora.tasks.types import Split

__all__ = ["Engine", "load_engine"]

LOOP = "VLLM_ENABLE_V1_MULTIPROCESSING"
"""The variable by which vLLM's loop has a process of its own."""
QUERIES_AT_ONCE = 256
"""How many prompts are handed to the engine at a time; under every adapter each."""


@final
@dataclass(frozen=True)
class Engine:
    """An engine with the draws of a posterior.

    Attributes:
        llm: vLLM's ``LLM``.
        adapters: Its ``LoRARequest`` of each draw.
        tokenizer: The base model's.
        averages: Whether it can generate from the average of the draws.
    """

    llm: Any
    adapters: tuple[Any, ...]
    tokenizer: Tokenizer
    averages: bool = False

    def predict(self, split: Split, *, base: bool = False) -> Prediction:
        """Return every draw's probabilities of the choices; see `bayeslora.predict`.

        Args:
            split: The N examples; their format's readout is ``letters``, ``likelihood`` or ``auto``.
            base: Whether to ask the base model too.

        Returns:
            The prediction, a draw for each adapter; without a pass at the mean, and without a Monte Carlo error.
        """
        began = time.perf_counter()
        queries, neutral, readout, cut = queries_of_split(split, self.tokenizer)
        asked = [*queries, *unique_pairs(neutral).values()]
        adapters = (*[None] * base, *self.adapters)
        draws: list[list[list[float]]] = [[] for _ in adapters]
        for start in range(0, len(asked), QUERIES_AT_ONCE):
            found = self._log_likelihoods(asked[start : start + QUERIES_AT_ONCE], adapters)
            for draw, values in zip(draws, found, strict=True):
                draw += values
        scores = torch.stack([choice_scores(draw, queries, neutral) for draw in draws])
        every = scores.log_softmax(-1).float()
        untuned, seconds = every[0] if base else None, time.perf_counter() - began
        return Prediction(every[int(base) :], truncated=cut, readout=readout, seconds=seconds, base_log_probs=untuned)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 128,
        temperature: float = 1.0,
        seed: int = 0,
        settings: Mapping[str, object] | None = None,
    ) -> list[Answer]:
        """Return text for each prompt, the draws' probabilities averaged at each token; see `bayeslora.generate`.

        Args:
            prompts: Texts.
            max_tokens: Most tokens of a text.
            temperature: Of the average; 0 takes the most probable tokens.
            seed: Seed of the tokens; prompt i has ``seed + i``.
            settings: More of vLLM's ``SamplingParams``, such as ``top_p`` or ``stop``.

        Returns:
            The texts. The engine gives no entropies (they are not a number) and no alternatives.

        Raises:
            InputError: If the engine was not loaded to average, or a prompt is too long for its batches.
        """
        from vllm import SamplingParams

        if not self.averages:
            raise InputError("this engine does not average; load it with load_engine(…, average=True)")
        size, answers = len(self.adapters), list[Answer]()
        usual = {"max_tokens": max_tokens, "temperature": temperature, "logprobs": 0}
        encoded = [list(map(int, self.tokenizer(prompt)["input_ids"])) for prompt in prompts]
        for part in self._parts(encoded):
            asked = [
                SamplingParams(**usual, seed=seed + number, extra_args={GROUP: [number, size]}, **dict(settings or {}))
                for number in part
            ]
            outputs = self.llm.generate(
                [{"prompt_token_ids": encoded[number]} for number in part for _ in self.adapters],
                [params for params in asked for _ in self.adapters],
                lora_request=[*self.adapters] * len(part),
                use_tqdm=False,
            )
            answers += [self._answer(outputs[at : at + size]) for at in range(0, len(outputs), size)]
        return answers

    def _parts(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Give the numbers of prompts that begin in one step under all adapters, as many as the engine has room for."""
        config, size = self.llm.llm_engine.vllm_config.scheduler_config, len(self.adapters)
        part, tokens = list[int](), 0
        for number, prompt in enumerate(prompts):
            wanted = size * len(prompt)
            if wanted > config.max_num_batched_tokens or size > config.max_num_seqs:
                raise InputError(
                    f"prompt {number} has {len(prompt)} tokens, which {size} draws do not begin together in the "
                    f"engine's {config.max_num_batched_tokens} tokens and {config.max_num_seqs} rows; raise "
                    "max_num_batched_tokens and max_num_seqs in its settings"
                )
            if tokens + wanted > config.max_num_batched_tokens or (len(part) + 1) * size > config.max_num_seqs:
                yield part
                part, tokens = [], 0
            part.append(number)
            tokens += wanted
        if part:
            yield part

    def _answer(self, outputs: Sequence[Any]) -> Answer:
        """Return the text that all draws' rows have."""
        one = outputs[0].outputs[0]
        ids = tuple(one.token_ids)
        by_draw = [[float(o[i].logprob) for o, i in zip(out.outputs[0].logprobs, ids, strict=True)] for out in outputs]
        draw_log_probs = torch.tensor(by_draw).view(len(outputs), len(ids))
        unknown = torch.full((len(ids),), math.nan)
        return Answer(
            text=one.text,
            token_ids=ids,
            tokens=tuple(self.tokenizer.decode([i]) for i in ids),
            log_probs=draw_log_probs.logsumexp(0) - math.log(len(outputs)),
            draw_log_probs=draw_log_probs,
            entropy=unknown,
            expected_entropy=unknown,
            alternatives=((),) * len(ids),
            finished="stop" if one.finish_reason == "stop" else "length",
        )

    def _log_likelihoods(self, queries: Sequence[Query], adapters: Sequence[object | None]) -> list[list[list[float]]]:
        """Return natural logarithms by adapter, of which None is the base, query and answer."""
        from vllm import SamplingParams

        wanted = [(number, *read) for number, query in enumerate(queries) for read in reads(query)]
        prompts = [{"prompt_token_ids": [*map(int, queries[number].prompt), *start]} for number, start, _ in wanted]
        one_token = [
            SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=list(tokens), detokenize=False)
            for _, _, tokens in wanted
        ]
        outputs = self.llm.generate(
            prompts * len(adapters),
            one_token * len(adapters),
            lora_request=[adapter for adapter in adapters for _ in wanted],
            use_tqdm=False,
        )
        draws = []
        for k in range(len(adapters)):
            log_probs: list[dict[tuple[Ids, int], float]] = [{} for _ in queries]
            for (number, start, tokens), output in zip(wanted, outputs[k * len(wanted) :], strict=False):
                shown = output.outputs[0].logprobs[0]
                log_probs[number].update({(start, token): float(shown[token].logprob) for token in tokens})
            draws.append([log_likelihoods_of(*pair) for pair in zip(queries, log_probs, strict=True)])
        return draws


def load_engine(
    folder: str | Path, *, base: str = "", average: bool = False, settings: Mapping[str, object] | None = None
) -> Engine:
    """Start vLLM in this process with the draws that `bayeslora export` wrote.

    Args:
        folder: What was given to `export` as ``--out``: a folder with an adapter in each sub-folder. One that is
            called the mean is left out.
        base: The base model; empty for the one that the adapters name.
        average: Whether it is to generate from the average of the draws too, see `Engine.generate`: the engine's
            loop then runs in this process, so that all draws of a prompt begin together.
        settings: More arguments of vLLM's ``LLM``, such as ``dtype`` or ``gpu_memory_utilization``.

    Returns:
        The engine.

    Raises:
        InputError: If vLLM is not installed, the folder has no adapters, or vLLM would refuse them.
    """
    folders = [path.parent for path in sorted(Path(folder).glob(f"*/{ADAPTER_CONFIG}"))]
    folders = [path for path in folders if path.name != "mean" and not path.name.endswith("-mean")]
    if not folders:
        raise InputError(f"{folder} holds no adapters of draws; write some with bayeslora export RUN --out {folder}")
    config = read_object(folders[0] / ADAPTER_CONFIG, missing="")
    if reasons := refusals(config):
        raise InputError(
            f"vLLM does not serve the adapters in {folder}: {' and '.join(reasons)}; use bayeslora.predict"
        )
    try:
        from vllm import LLM
        from vllm.lora.request import LoRARequest
    except ModuleNotFoundError as missing:
        raise InputError(
            f"vLLM's engine needs {missing.name}; install vllm in an environment of its own, and bayeslora beside it"
        ) from missing
    name = base or str(config.get("base_model_name_or_path") or "")
    if not name:
        raise InputError(f"the adapters in {folder} do not say what their base model is; name it, base=…")
    usual: dict[str, object] = {
        "enable_lora": True,
        "max_loras": len(folders),
        "max_lora_rank": next(rank for rank in VLLM_RANKS if rank >= max_rank(config)),
        "lora_target_modules": plain_modules(config),
    }
    with _loop_here() if average else nullcontext():
        if average:
            from bayeslora.integrations.vllm_averaging import AverageDraws

            usual["logits_processors"] = [AverageDraws]
        llm = LLM(name, **(usual | dict(settings or {})))
    adapters = [LoRARequest(served_name(path.name, path), k + 1, str(path)) for k, path in enumerate(folders)]
    return Engine(llm, tuple(adapters), llm.get_tokenizer(), average)


@contextmanager
def _loop_here() -> Iterator[None]:
    """Have vLLM run its loop in this process: it then begins once it has all requests, and not with the first."""
    before = os.environ.get(LOOP)
    os.environ[LOOP] = "0"
    try:
        yield
    finally:
        os.environ.pop(LOOP)
        if before is not None:
            os.environ[LOOP] = before
