"""One thread that has the model: requests wait in a bounded queue, and rows that fit together share a batch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, final

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from transformers import LogitsProcessorList

from bayeslora.errors import InputError
from bayeslora.integrations.server.decoding import Choosing, Row
from bayeslora.params import Params, evaluating, require_lora, swapped
from bayeslora.posteriors import Draws, Point, Posterior
from bayeslora.prediction.generation.decoding import Decoder, Step, ends_of
from bayeslora.tasks.types import Split


class BusyError(Exception):
    """The queue is full."""


@final
@dataclass(frozen=True)
class Served:
    """What a server answers with.

    Attributes:
        name: Name of the model that averages the draws; ``name/mean`` and ``name/draw-000`` … are its parts.
        model: PEFT model.
        tokenizer: Its tokenizer.
        posterior: What was learned.
        draws: Draws unless a request says otherwise.
        most_draws: Most draws of a request.
        like: An empty split with the task's format and classes, for `/v1/classify`.
        seed: Which stream of draws.
        text_column: Column of the text in rows that `/v1/classify` is given; empty: the usual names.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    posterior: Posterior
    draws: int
    most_draws: int
    like: Split
    seed: int = 0
    text_column: str = ""

    @property
    def names(self) -> list[str]:
        """Names of the models, the average first."""
        return [self.name, f"{self.name}/mean", *(f"{self.name}/draw-{k:03d}" for k in range(self.most_draws))]

    @property
    def generates(self) -> bool:
        """Whether the model is a language model."""
        return require_lora(self.model).get_base_model().get_output_embeddings() is not None

    def posterior_of(self, name: str) -> Posterior:
        """Return the posterior that a model's name stands for.

        Args:
            name: One of ``names``.
        """
        part = name.removeprefix(self.name).lstrip("/")
        if not part:
            return self.posterior
        return Point(self.posterior.mean if part == "mean" else self.drawn(int(part.removeprefix("draw-"))))

    def drawn(self, index: int) -> Params:
        """Return a draw.

        Args:
            index: Its number.
        """
        return self.posterior.cached_draw(index, Draws(seed=self.seed))


@final
@dataclass
class Generation:
    """Rows of one request.

    Attributes:
        drawn: The draws that are averaged.
        key: What the draws are known by; only requests with the same share a batch.
        rows: The rows.
        error: What went wrong.
    """

    drawn: Callable[[], list[Params]]
    key: tuple[str, int]
    rows: list[Row]
    error: Exception | None = None


@final
@dataclass
class Call:
    """Anything else that needs the model.

    Attributes:
        work: What to do.
        result: What it gave.
    """

    work: Callable[[], Any]
    result: Future[Any] = field(default_factory=Future)


@final
class Worker:
    """The thread.

    Args:
        served: What answers.
        most_waiting: Most requests in the queue.
        most_rows: Most rows of a batch.
    """

    def __init__(self, served: Served, most_waiting: int, most_rows: int) -> None:
        self.served, self.most_waiting, self.most_rows = served, most_waiting, most_rows
        self._waiting: deque[Generation | Call] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.batches: list[int] = []
        self._thread = threading.Thread(target=self._work, name="bayeslora-model", daemon=True)
        self._thread.start()

    def submit(self, job: Generation | Call) -> None:
        """Put a job into the queue.

        Args:
            job: The job.

        Raises:
            BusyError: If the queue is full, or the server is stopping.
        """
        with self._changed:
            if self._closed or len(self._waiting) >= self.most_waiting:
                raise BusyError
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """End the thread: what waits is refused, what runs comes to its next token."""
        with self._changed:
            self._closed = True
            left, self._waiting = list(self._waiting), deque()
            self._changed.notify()
        for job in left:
            _failed(job, BusyError())
        self._thread.join(timeout=10)

    def _work(self) -> None:
        """Do jobs until the end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                first = self._waiting.popleft()
                together = [first]
                if isinstance(first, Generation):
                    self._gather(first, together)
            try:
                if isinstance(first, Call):
                    first.result.set_result(first.work())
                else:
                    self._generate([job for job in together if isinstance(job, Generation)])
            except Exception as error:  # the thread lives on; the request is told
                for job in together:
                    _failed(job, error)

    def _gather(self, first: Generation, together: list[Generation | Call]) -> None:
        """Take out of the queue what fits into a batch with the first."""
        count = len(first.rows)
        for job in list(self._waiting):
            if isinstance(job, Generation) and job.key == first.key and count + len(job.rows) <= self.most_rows:
                self._waiting.remove(job)
                together.append(job)
                count += len(job.rows)

    def _generate(self, jobs: list[Generation]) -> None:
        """Generate the rows of some requests in one batch."""
        rows = [row for job in jobs for row in job.rows]
        self.batches.append(len(rows))
        del self.batches[:-100]
        self._decode(rows, jobs[0].drawn())
        for row in rows:
            row.told(None)

    def _decode(self, rows: Sequence[Row], drawn: list[Params]) -> None:
        """Generate rows; a batch too large for memory is halved if nothing of it is there yet."""
        tokenizer = self.served.tokenizer
        ends = ends_of(require_lora(self.served.model).get_base_model(), {})

        def note(step: Step) -> bool:
            """Give each row its token; say whether all have ended."""
            for number, row in enumerate(rows):
                if self._closed:
                    row.cancelled.set()
                if row.finish is None:
                    row.take(tokenizer, step, number, ends)
            return all(row.finish is not None for row in rows)

        settings = {
            "max_new_tokens": max(row.longest for row in rows), "do_sample": False,
            "logits_processor": LogitsProcessorList([Choosing(rows)]),
        }  # fmt: skip
        decoder = Decoder(self.served.model, drawn, True, tokenizer, settings)
        try:
            decoder.answers([row.ids for row in rows], lambda number, _: rows[number].finish is not None, note)
        except RuntimeError as error:
            if not should_reduce_batch_size(error) or any(row.notes for row in rows):
                raise
            if len(rows) == 1:
                raise InputError("the prompt does not fit into memory") from error
        else:
            return
        clear_device_cache(garbage_collection=True)
        for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            self._decode(part, drawn)


def _failed(job: Generation | Call, error: Exception) -> None:
    """Tell whoever waits for a job that it failed."""
    if isinstance(job, Call):
        if not job.result.done():
            job.result.set_exception(error)
        return
    job.error = error
    for row in job.rows:
        row.told(None)


@torch.inference_mode()
def prompt_log_probs(model: nn.Module, drawn: Sequence[Params], ids: Sequence[int]) -> torch.Tensor:
    """Return log p̄ of what follows each token but the last of a prompt, averaged over draws at each token.

    Args:
        model: PEFT model, a causal language model.
        drawn: The draws.
        ids: The T tokens of the prompt.

    Returns:
        Float32 [T-1 V] on the CPU.
    """
    base = require_lora(model).get_base_model()
    given = torch.tensor([list(ids)], device=base.get_input_embeddings().weight.device)
    total = None
    with evaluating(model):
        for draw in drawn:
            with swapped(model, draw):
                log_p = base(input_ids=given, use_cache=False).logits[0, :-1].float().log_softmax(-1).cpu()
            total = log_p if total is None else torch.logaddexp(total, log_p)
    assert total is not None
    return total - torch.tensor(float(len(drawn))).log()
