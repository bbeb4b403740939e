"""Answers in the making: each row has its own sampling settings, and many share one batch."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor
from transformers import LogitsProcessor

from bayeslora._typing import Float, Int, Tokenizer
from bayeslora.integrations.server.errors import late
from bayeslora.integrations.server.text import Text
from bayeslora.params import seed_of
from bayeslora.prediction.generation.decoding import Step, alternatives

Finish = Literal["stop", "length", "cancelled"]
LogProbs = dict[str, list[object]]
"""Log-probabilities in the form of ``/v1/completions``: a list of each field, one entry a token."""


@final
@dataclass(frozen=True)
class Echo:
    """A prompt that is given back before its answer."""

    text: str = ""
    log_probs: LogProbs | None = None


@final
@dataclass(frozen=True)
class TokenNote:
    """One token of an answer, with log p̄, H(p̄) and what the draws disagree about, in nats."""

    id: int
    token: str  # its text by itself
    text: str  # what it adds to the answer's text; empty while a letter or a stop string is not complete
    log_prob: float
    entropy: float
    mutual_information: float
    alternatives: tuple[tuple[str, float], ...]  # the most probable tokens in its place, with their p̄
    draw_log_probs: tuple[float, ...]
    finish: Finish | None  # why the answer ends with it, if it does

    def uncertainty(self) -> dict[str, object]:
        """Return what OpenAI's interface has no field for."""
        return {
            "token": self.token,
            "prob": math.exp(self.log_prob),
            "entropy": self.entropy,
            "mutual_information": self.mutual_information,
            "alternatives": [{"token": token, "prob": p} for token, p in self.alternatives],
        }


@final
@dataclass
class Row:
    """One answer, as it is requested and as far as it is written; ``on_token`` is called with None at its end."""

    ids: list[int]  # the prompt's
    max_tokens: int
    temperature: float  # of the averaged distribution; below `GREEDY` the most probable token is taken
    top_p: float
    seed: int  # of the row's own random numbers
    stops: tuple[str, ...]
    on_token: Callable[[TokenNote | None], None] = lambda note: None
    notes: list[TokenNote] = field(default_factory=list)
    finish: Finish | None = None
    echo: Echo = Echo()  # the prompt, if it is given back before the answer
    cancelled: threading.Event = field(default_factory=threading.Event)  # set when nobody waits for it any more

    def __post_init__(self) -> None:
        self._text = Text(self.stops)

    @property
    def text(self) -> str:
        """The answer's text as far as it is certain."""
        return self._text.settled

    @property
    def so_far(self) -> list[int]:
        """The prompt's tokens and the answer's."""
        return [*self.ids, *(note.id for note in self.notes)]

    def take(self, tokenizer: Tokenizer, step: Step, row: int, ends: set[int]) -> None:
        """Note the next token, that of a step's row, and end the answer where it ends, as with one of ``ends``."""
        token, log_prob = int(step.token_ids[row]), float(step.log_probs[row])
        if math.isnan(log_prob):
            raise FloatingPointError("the model's probabilities are not numbers")
        before = len(self.text)
        if self._text.add(tokenizer, token) or token in ends:
            self.finish = "stop"
        elif len(self.notes) + 1 >= self.max_tokens:
            self.finish = "length"
        if self.finish is not None:
            self._text.close(tokenizer)
        note = TokenNote(
            id=token,
            token=tokenizer.decode([token]),
            text=self.text[before:],
            log_prob=log_prob,
            entropy=float(step.entropy[row]),
            mutual_information=max(0.0, float(step.entropy[row] - step.expected_entropy[row])),
            alternatives=alternatives(tokenizer, step, row),
            draw_log_probs=tuple(step.draw_log_probs[:, row].tolist()),
            finish=self.finish,
        )
        self.notes.append(note)
        self.on_token(note)
        if self.finish is not None:
            self.on_token(None)

    def cancel(self) -> None:
        """End the answer without a further token."""
        self.finish = "cancelled"
        self.on_token(None)


@final
@dataclass(eq=False)
class Generation:
    """The rows of one request; only requests for the same model's same number of draws share a batch."""

    model: str
    draws: int
    rows: list[Row]
    deadline: float = math.inf  # of `time.monotonic`
    error: Exception | None = None
    seated: int = 0  # rows that are in a batch or have been

    @property
    def key(self) -> tuple[str, int]:
        """What those who share a batch have in common."""
        return self.model, self.draws

    def fail(self, error: Exception) -> None:
        """Note what went wrong, and tell whoever waits."""
        if self.error is None:
            self.error = error
            for row in self.rows:
                row.on_token(None)

    def over(self, row: Row) -> bool:
        """Say whether a row gets no more tokens; it ends here if it is late or nobody waits for it any more."""
        if time.monotonic() > self.deadline and row.finish is None:
            self.fail(late())
        elif row.cancelled.is_set() and row.finish is None:
            row.cancel()
        return row.finish is not None or self.error is not None


GREEDY = 1e-5
"""Temperatures below it take the most probable token, for their distribution is that token's but for rounding."""


def choose(rows: Sequence[Row], log_probs: Float[Tensor, "R V"]) -> Int[Tensor, " R"]:
    """Return each row's next token by the row's own temperature, nucleus and random number."""
    picks = log_probs.argmax(-1)
    sampled = [number for number, row in enumerate(rows) if row.temperature >= GREEDY and row.finish is None]
    if not sampled:
        return picks
    of = [rows[number] for number in sampled]
    device = torch.device("cpu") if log_probs.device.type == "mps" else log_probs.device  # MPS has no float64
    temperatures = torch.tensor([[row.temperature] for row in of], dtype=torch.float64, device=device)
    probs = (log_probs[sampled].to(device, torch.float64) / temperatures).softmax(-1)
    for place, row in enumerate(of):
        if row.top_p < 1:
            ordered, places = probs[place].sort(descending=True)
            left_out = ordered.cumsum(-1) - ordered >= row.top_p  # the first token is always in
            probs[place, places[left_out]] = 0.0
    # one uniform number of the row's seed and place for each token, however often the token is asked for
    numbers = [[(seed_of("row", row.seed, len(row.notes)) >> 10) / 2**53] for row in of]
    uniform = torch.tensor(numbers, dtype=torch.float64, device=device)
    total = probs.cumsum(-1)
    found = torch.searchsorted(total, uniform * total[:, -1:], right=True)[:, 0].clamp(max=total.shape[1] - 1)
    picks[sampled] = found.to(picks.device)
    return picks


@final
class RowSampler(LogitsProcessor):
    """`choose` for transformers' ``generate``."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return zero for the tokens that are chosen and minus infinity for the others."""
        picks = choose(self.rows, scores)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, picks, 0.0)
