"""Answers with OpenAI's fields, and ``uncertainty`` beside them."""

from __future__ import annotations

import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, final

import torch

from bayeslora.integrations.server.decoding import LogProbs, Row, TokenNote

Json = dict[str, object]
"""A JSON object that this server writes."""


class Completion(ABC):
    """One answer to a request, whole or as the pieces of a stream.

    ``top`` is how many alternatives are reported with each token's log-probability; None for no log-probabilities.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    piece_kind: ClassVar[str]

    def __init__(self, model: str, draws: int, top: int | None) -> None:
        self.draws, self.top = draws, top
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, rows: Sequence[Row]) -> Json:
        """Return a whole answer out of rows that have ended, each after its echo."""
        choices = [
            {
                "index": index,
                "finish_reason": row.finish,
                "uncertainty": {**summary(row.notes, self.draws), "tokens": [note.uncertainty() for note in row.notes]},
                **self.choice(row),
            }
            for index, row in enumerate(rows)
        ]
        return {**self.head, "object": self.kind, "choices": choices, "usage": usage(rows)}

    def piece(self, index: int, note: TokenNote) -> Json:
        """Return one token of a choice."""
        choice = {"index": index, "finish_reason": note.finish, "uncertainty": note.uncertainty(), **self.part(note)}
        return {**self.head, "object": self.piece_kind, "choices": [choice]}

    def closing(self, rows: Sequence[Row]) -> Json:
        """Return a stream's last piece, the tokens used."""
        return {**self.head, "object": self.piece_kind, "choices": [], "usage": usage(rows)}

    def opening(self, index: int) -> Json | None:
        """Return what comes before a choice's first token, if anything does."""
        return None

    @abstractmethod
    def choice(self, row: Row) -> Json:
        """Return the text and the log-probabilities of a whole choice."""

    @abstractmethod
    def part(self, note: TokenNote) -> Json:
        """Return the text and the log-probabilities of a token."""


@final
class TextCompletion(Completion):
    """``/v1/completions``."""

    prefix = "cmpl"
    kind = piece_kind = "text_completion"

    def choice(self, row: Row) -> Json:
        """Return the text, after the prompt where that is echoed."""
        log_probs = self._log_probs(row.notes, len(row.echo.text))
        if log_probs is not None and row.echo.log_probs is not None:
            log_probs = {key: [*row.echo.log_probs[key], *values] for key, values in log_probs.items()}
        return {"text": row.echo.text + row.text, "logprobs": log_probs}

    def part(self, note: TokenNote) -> Json:
        """Return one token's text."""
        return {"text": note.text, "logprobs": self._log_probs([note], 0)}

    def _log_probs(self, notes: Sequence[TokenNote], offset: int) -> LogProbs | None:
        """Return the log-probabilities, for a text that begins at an offset."""
        if self.top is None:
            return None
        offsets: list[object] = []
        for note in notes:
            offsets.append(offset)
            offset += len(note.text)
        return {
            "tokens": [note.token for note in notes],
            "token_logprobs": [note.log_prob for note in notes],
            "top_logprobs": [dict(_top(note, self.top)) for note in notes],
            "text_offset": offsets,
        }


@final
class ChatCompletion(Completion):
    """``/v1/chat/completions``."""

    prefix = "chatcmpl"
    kind, piece_kind = "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> Json | None:
        """Return the role."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "finish_reason": None, "delta": delta, "logprobs": None}
        return {**self.head, "object": self.piece_kind, "draws": max(1, self.draws), "choices": [choice]}

    def choice(self, row: Row) -> Json:
        """Return the message."""
        message = {"role": "assistant", "content": row.text, "refusal": None}
        return {"message": message, "logprobs": self._log_probs(row.notes)}

    def part(self, note: TokenNote) -> Json:
        """Return what the message grows by."""
        return {"delta": {"content": note.text}, "logprobs": self._log_probs([note])}

    def _log_probs(self, notes: Sequence[TokenNote]) -> Json | None:
        """Return the log-probabilities in the form of chats."""
        if self.top is None:
            return None

        def entry(token: str, log_p: float) -> Json:
            """Return one token."""
            return {"token": token, "logprob": log_p, "bytes": list(token.encode())}

        content = [
            {**entry(note.token, note.log_prob), "top_logprobs": [entry(*pair) for pair in _top(note, self.top)]}
            for note in notes
        ]
        return {"content": content, "refusal": None}


def summary(notes: Sequence[TokenNote], draws: int) -> Json:
    """Return what is uncertain about a whole answer, in nats; its mean likelihood is the draws'."""
    count = max(1, len(notes))
    by_draw = torch.tensor([note.draw_log_probs for note in notes]).sum(0) if notes else torch.zeros(1)
    return {
        "draws": max(1, draws),  # 0 is the mean, which is one
        "log_likelihood": sum(note.log_prob for note in notes),
        "log_mean_likelihood": float(by_draw.logsumexp(0)) - math.log(len(by_draw)),
        "mean_entropy": sum(note.entropy for note in notes) / count,
        "mean_mutual_information": sum(note.mutual_information for note in notes) / count,
        "max_mutual_information": max((note.mutual_information for note in notes), default=0.0),
    }


def usage(rows: Sequence[Row]) -> dict[str, int]:
    """Return the tokens of a request; rows that share a prompt count it once."""
    prompt = sum({id(row.ids): len(row.ids) for row in rows}.values())
    completion = sum(len(row.notes) for row in rows)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _top(note: TokenNote, count: int) -> list[tuple[str, float]]:
    """Return the alternatives of a token that are reported, with their log-probabilities."""
    return [(token, math.log(max(p, 1e-45))) for token, p in note.alternatives[:count]]
