"""The answers' shapes: OpenAI's fields, and ``uncertainty`` beside them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch

from bayeslora.integrations.server.decoding import Row, TokenNote


def summary(notes: Sequence[TokenNote], draws: int) -> dict[str, Any]:
    """Return what is uncertain about a whole answer.

    Args:
        notes: Its tokens.
        draws: Number of draws.

    Returns:
        Nats; ``log_mean_likelihood`` is the log of the draws' mean likelihood of the whole answer.
    """
    count = max(1, len(notes))
    whole = torch.tensor([note.draw_log_probs for note in notes]).sum(0) if notes else torch.zeros(1)
    return {
        "draws": draws,
        "log_likelihood": sum(note.log_prob for note in notes),
        "log_mean_likelihood": float(whole.logsumexp(0)) - math.log(len(whole)),
        "mean_entropy": sum(note.entropy for note in notes) / count,
        "mean_mutual_information": sum(note.mutual_information for note in notes) / count,
        "max_mutual_information": max((note.mutual_information for note in notes), default=0.0),
    }


def used(rows: Sequence[Row]) -> dict[str, int]:
    """Return the tokens of a request.

    Args:
        rows: Its rows.
    """
    given = sum({id(row.ids): len(row.ids) for row in rows}.values())
    made = sum(len(row.notes) for row in rows)
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}


class Shape(ABC):
    """How answers look.

    Args:
        model: Name of the model.
        top: How many alternatives are reported with each token's log-probability; None for no log-probabilities.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    piece_kind: ClassVar[str]

    def __init__(self, model: str, top: int | None) -> None:
        self.model, self.top = model, top

    def whole(
        self, numbers: dict[str, Any], rows: Sequence[Row], before: list[dict[str, Any]] | None, draws: int
    ) -> dict[str, Any]:
        """Return a whole answer.

        Args:
            numbers: ``id`` and ``created``.
            rows: The rows, ended.
            before: The prompts with their log-probabilities, where they are echoed.
            draws: Number of draws.
        """
        choices = []
        for index, row in enumerate(rows):
            extra = {**summary(row.notes, draws), "tokens": [note.uncertainty() for note in row.notes]}
            own = self.choice(row, None if before is None else before[index])
            choices.append({"index": index, "finish_reason": row.finish, "uncertainty": extra, **own})
        return {**numbers, "object": self.kind, "model": self.model, "choices": choices, "usage": used(rows)}

    def piece(self, numbers: dict[str, Any], index: int, note: TokenNote, finish: str | None) -> dict[str, Any]:
        """Return one token of a stream.

        Args:
            numbers: ``id`` and ``created``.
            index: Number of the choice.
            note: The token.
            finish: Why the choice ends with it, if it does.
        """
        own = {"index": index, "finish_reason": finish, "uncertainty": note.uncertainty(), **self.part(note)}
        return {**numbers, "object": self.piece_kind, "model": self.model, "choices": [own]}

    def closing(self, numbers: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
        """Return a stream's last piece, the tokens used.

        Args:
            numbers: ``id`` and ``created``.
            rows: The rows.
        """
        return {**numbers, "object": self.piece_kind, "model": self.model, "choices": [], "usage": used(rows)}

    def opening(self, numbers: dict[str, Any], index: int, draws: int) -> dict[str, Any] | None:
        """Return what comes before a choice's first token, if anything does."""
        return None

    @abstractmethod
    def choice(self, row: Row, before: dict[str, Any] | None) -> dict[str, Any]:
        """Return the text and the log-probabilities of a whole choice."""

    @abstractmethod
    def part(self, note: TokenNote) -> dict[str, Any]:
        """Return the text and the log-probabilities of a token."""


@final
class Text(Shape):
    """``/v1/completions``."""

    prefix = "cmpl"
    kind = piece_kind = "text_completion"

    def choice(self, row: Row, before: dict[str, Any] | None) -> dict[str, Any]:
        """Return the text, after the prompt where that is echoed."""
        start = "" if before is None else before["text"]
        found: dict[str, Any] = {"text": start + row.text, "logprobs": None}
        if self.top is not None:
            own = self._log_probs(row.notes, len(start))
            echo = (before or {}).get("logprobs") or {}
            found["logprobs"] = {key: [*echo.get(key, ()), *values] for key, values in own.items()}
        return found

    def part(self, note: TokenNote) -> dict[str, Any]:
        """Return one token's text."""
        return {"text": note.text, "logprobs": None if self.top is None else self._log_probs([note], 0)}

    def _log_probs(self, notes: Sequence[TokenNote], offset: int) -> dict[str, list[Any]]:
        """Return the log-probabilities in the shape of old completions."""
        offsets = []
        for note in notes:
            offsets.append(offset)
            offset += len(note.text)
        return {
            "tokens": [note.token for note in notes],
            "token_logprobs": [note.log_prob for note in notes],
            "top_logprobs": [{t: math.log(max(p, 1e-45)) for t, p in note.alternatives[: self.top]} for note in notes],
            "text_offset": offsets,
        }


@final
class Chat(Shape):
    """``/v1/chat/completions``."""

    prefix = "chatcmpl"
    kind, piece_kind = "chat.completion", "chat.completion.chunk"

    def opening(self, numbers: dict[str, Any], index: int, draws: int) -> dict[str, Any] | None:
        """Return the role."""
        own = {"index": index, "finish_reason": None, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
        return {**numbers, "object": self.piece_kind, "model": self.model, "draws": draws, "choices": [own]}

    def choice(self, row: Row, before: dict[str, Any] | None) -> dict[str, Any]:
        """Return the message."""
        message = {"role": "assistant", "content": row.text, "refusal": None}
        return {"message": message, "logprobs": self._log_probs(row.notes)}

    def part(self, note: TokenNote) -> dict[str, Any]:
        """Return what the message grows by."""
        return {"delta": {"content": note.text}, "logprobs": self._log_probs([note])}

    def _log_probs(self, notes: Sequence[TokenNote]) -> dict[str, Any] | None:
        """Return the log-probabilities in the shape of chats."""
        if self.top is None:
            return None

        def entry(token: str, log_p: float) -> dict[str, Any]:
            """Return one token."""
            return {"token": token, "logprob": log_p, "bytes": list(token.encode())}

        content = []
        for note in notes:
            top = [entry(t, math.log(max(p, 1e-45))) for t, p in note.alternatives[: self.top]]
            content.append({**entry(note.token, note.log_prob), "top_logprobs": top})
        return {"content": content, "refusal": None}


def placed(tokenizer: Any, prompt: str | list[int], ids: Sequence[int]) -> tuple[str, list[int]]:
    """Return a prompt's text, and where each of its tokens begins in it.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The prompt as it was given.
        ids: Its tokens.

    Returns:
        The text and the places.
    """
    if isinstance(prompt, str) and tokenizer.is_fast:
        spans = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        return prompt, [start for start, _ in spans[: len(ids)]]
    starts = [tokenizer.decode(list(ids[:k]), skip_special_tokens=True) for k in range(len(ids) + 1)]
    return starts[-1], [len(text) for text in starts[:-1]]


def echoed(
    tokenizer: Any, ids: Sequence[int], starts: Sequence[int], log_p: torch.Tensor, top: int
) -> dict[str, list[Any]]:
    """Return the log-probabilities of a prompt's tokens in the shape of old completions.

    Args:
        tokenizer: The model's tokenizer.
        ids: The prompt's T tokens.
        starts: Where each begins in the text.
        log_p: log p̄ of what follows each token but the last [T-1 V].
        top: How many alternatives.

    Returns:
        The fields; the first token has no log-probability.
    """
    own = log_p.gather(1, torch.tensor(list(ids[1:]), dtype=torch.long)[:, None])[:, 0].tolist()
    best = log_p.topk(top)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    tops = [{tokenizer.decode([i]): p for i, p in zip(*pair, strict=True)} for pair in pairs]
    return {
        "tokens": [tokenizer.decode([i]) for i in ids],
        "token_logprobs": [None, *own],
        "top_logprobs": [None, *tops],
        "text_offset": list(starts),
    }
