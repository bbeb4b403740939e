"""What a server generates: rows with settings of their own, many of them in one batch."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor
from transformers import LogitsProcessor

from bayeslora.params import generator
from bayeslora.prediction.generation.decoding import Step, alternatives

Finish = Literal["stop", "length", "timeout", "cancelled"]


@final
@dataclass(frozen=True)
class TokenNote:
    """One token of an answer.

    Attributes:
        id: The token.
        token: Its text by itself.
        text: What it adds to the answer's text; empty while a letter or a stop string is not complete.
        log_prob: log p̄, nats.
        entropy: H(p̄), nats.
        mutual_information: What the draws disagree about, nats.
        alternatives: The most probable tokens in its place, with their p̄.
        draw_log_probs: Each draw's log-probability of it.
    """

    id: int
    token: str
    text: str
    log_prob: float
    entropy: float
    mutual_information: float
    alternatives: tuple[tuple[str, float], ...]
    draw_log_probs: tuple[float, ...]

    def uncertainty(self) -> dict[str, Any]:
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
    """One answer that is asked for, and what there is of it.

    Attributes:
        ids: The prompt's tokens.
        longest: Most new tokens.
        temperature: Of the averaged distribution; 0 takes the most probable token.
        top_p: Smallest set of tokens with this much probability; 1 for all.
        seed: Of the row's own stream of random numbers.
        stops: Texts that end it.
        deadline: Time (`time.monotonic`) at which it ends whatever there is.
        told: Called with each token when it is there, and with None at the end.
        notes: The tokens so far.
        finish: Why it ended; None while it goes on.
        cancelled: Set when nobody waits for it any more.
    """

    ids: list[int]
    longest: int
    temperature: float
    top_p: float
    seed: int
    stops: tuple[str, ...]
    deadline: float
    told: Callable[[TokenNote | None], None] = lambda note: None
    notes: list[TokenNote] = field(default_factory=list)
    finish: Finish | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    _whole: str = ""
    _given: int = 0

    @property
    def text(self) -> str:
        """The answer's text as far as it is certain."""
        return self._whole[: self._given]

    def take(self, tokenizer: Any, step: Step, row: int, ends: set[int]) -> None:
        """Note the row's next token, and end the row where it ends.

        Args:
            tokenizer: The model's tokenizer.
            step: What was said of the tokens of all rows.
            row: The row's number in its batch.
            ends: Tokens that end a text.
        """
        token = int(step.token_ids[row])
        self._whole = tokenizer.decode([*(n.id for n in self.notes), token], skip_special_tokens=True)
        places = [self._whole.find(stop) for stop in self.stops if stop in self._whole]
        if places or token in ends:
            self.finish = "stop"
            self._whole = self._whole[: min(places, default=len(self._whole))]
        elif len(self.notes) + 1 >= self.longest:
            self.finish = "length"
        elif self.cancelled.is_set():
            self.finish = "cancelled"
        elif time.monotonic() > self.deadline:
            self.finish = "timeout"
        sure = len(self._whole) if self.finish else self._sure()
        added, self._given = self._whole[self._given : sure], max(self._given, sure)
        note = TokenNote(
            id=token,
            token=tokenizer.decode([token]),
            text=added,
            log_prob=float(step.log_probs[row]),
            entropy=float(step.entropy[row]),
            mutual_information=max(0.0, float(step.entropy[row] - step.expected_entropy[row])),
            alternatives=alternatives(tokenizer, step, row),
            draw_log_probs=tuple(step.draw_log_probs[:, row].tolist()),
        )
        self.notes.append(note)
        self.told(note)

    def _sure(self) -> int:
        """Return how much of the text cannot change: no half letter, and no beginning of a stop string."""
        whole = self._whole
        if whole.endswith("\N{REPLACEMENT CHARACTER}"):
            return self._given
        begun = [n for stop in self.stops for n in range(1, len(stop)) if whole.endswith(stop[:n])]
        return max(self._given, len(whole) - max(begun, default=0))


@final
class Choosing(LogitsProcessor):
    """Chooses each row's next token by the row's own temperature, share and stream.

    Args:
        rows: The rows of the batch.
    """

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
