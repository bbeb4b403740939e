"""Answers in the making: each row has its own sampling settings, and many share one batch."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor
from transformers import LogitsProcessor

from bayeslora._typing import Tokenizer
from bayeslora.params import generator
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
    temperature: float  # of the averaged distribution; 0 takes the most probable token
    top_p: float
    seed: int  # of the row's own stream of random numbers
    stops: tuple[str, ...]
    on_token: Callable[[TokenNote | None], None] = lambda note: None
    notes: list[TokenNote] = field(default_factory=list)
    finish: Finish | None = None
    echo: Echo = Echo()  # the prompt, if it is given back before the answer
    cancelled: threading.Event = field(default_factory=threading.Event)  # set when nobody waits for it any more
    _decoded: str = ""
    _settled: int = 0  # characters of the text that cannot change any more

    @property
    def text(self) -> str:
        """The answer's text as far as it is certain."""
        return self._decoded[: self._settled]

    def take(self, tokenizer: Tokenizer, step: Step, row: int, ends: set[int]) -> None:
        """Note the next token, that of a step's row, and end the answer where it ends, as with one of ``ends``."""
        token = int(step.token_ids[row])
        self._decoded = tokenizer.decode([*(note.id for note in self.notes), token], skip_special_tokens=True)
        places = [self._decoded.find(stop) for stop in self.stops if stop in self._decoded]
        if places or token in ends:
            self.finish = "stop"
            self._decoded = self._decoded[: min(places, default=len(self._decoded))]
        elif len(self.notes) + 1 >= self.max_tokens:
            self.finish = "length"
        elif self.cancelled.is_set():
            self.finish = "cancelled"
        before = self._settled
        self._settled = max(before, len(self._decoded) if self.finish else self._settled_length())
        note = TokenNote(
            id=token,
            token=tokenizer.decode([token]),
            text=self._decoded[before : self._settled],
            log_prob=float(step.log_probs[row]),
            entropy=float(step.entropy[row]),
            mutual_information=max(0.0, float(step.entropy[row] - step.expected_entropy[row])),
            alternatives=alternatives(tokenizer, step, row),
            draw_log_probs=tuple(step.draw_log_probs[:, row].tolist()),
            finish=self.finish,
        )
        self.notes.append(note)
        self.on_token(note)

    def _settled_length(self) -> int:
        """Return how much of the text cannot change: no half letter, and no beginning of a stop string."""
        text = self._decoded
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return self._settled
        begun = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return len(text) - max(begun, default=0)


@final
class RowSampler(LogitsProcessor):
    """Choose each row's next token by the row's own temperature, nucleus and stream of random numbers."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.streams = [generator("row", row.seed) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return zero for the tokens that are chosen and minus infinity for the others."""
        chosen = [self._choose(row, stream, s) for row, stream, s in zip(self.rows, self.streams, scores, strict=True)]
        picks = torch.tensor(chosen, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, picks, 0.0)

    def _choose(self, row: Row, stream: torch.Generator, scores: Tensor) -> int:
        """Return one row's token."""
        if row.temperature == 0 or row.finish is not None:
            return int(scores.argmax())
        probs = (scores.float() / row.temperature).softmax(-1).cpu()
        if row.top_p < 1:
            ordered, places = probs.sort(descending=True)
            left_out = ordered.cumsum(-1) - ordered >= row.top_p  # the first token is always in
            probs = torch.zeros_like(probs).scatter(0, places, ordered.masked_fill(left_out, 0.0))
        return int(torch.multinomial(probs, 1, generator=stream))
