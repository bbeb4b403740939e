"""Generated text with what the model thought of each token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from bayeslora._typing import Float
from bayeslora.prediction.generation.semantic import Equivalence, exactly, overlap, semantic_clusters


@final
@dataclass(frozen=True)
class Answer:
    """A generated text of T tokens, and what S draws say about it.

    Attributes:
        text: The text, without special tokens.
        token_ids: The T tokens; an end-of-text token is among them.
        tokens: The text of each token.
        log_probs: log p̄ of each token, the draws' probabilities averaged, in nats.
        draw_log_probs: Each draw's log-probability of each token.
        entropy: H(p̄) of the distribution that each token was taken from.
        expected_entropy: Mean of the draws' entropies.
        alternatives: The most probable tokens in the place of each, with their p̄.
        finished: ``stop`` if the model or a stop string ended it, ``length`` if it was cut.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    log_probs: Float[Tensor, " T"]
    draw_log_probs: Float[Tensor, "S T"]
    entropy: Float[Tensor, " T"]
    expected_entropy: Float[Tensor, " T"]
    alternatives: tuple[tuple[tuple[str, float], ...], ...]
    finished: Literal["stop", "length"]

    @property
    def mutual_information(self) -> Float[Tensor, " T"]:
        """What the draws disagree about at each token, in nats: H(p̄) less the expected entropy."""
        return (self.entropy - self.expected_entropy).clamp(min=0)

    @property
    def log_likelihood(self) -> float:
        """Sum of log p̄ over the tokens: the text's log-probability where draws are averaged at each token."""
        return float(self.log_probs.sum())

    @property
    def log_mean_likelihood(self) -> float:
        """Log of the mean over the draws of the whole text's likelihood: each draw goes on with itself."""
        return float(self.draw_log_probs.sum(1).logsumexp(0)) - math.log(len(self.draw_log_probs))

    @property
    def perplexity(self) -> float:
        """Exp of the mean of −log p̄ over the tokens; not a number for an empty text."""
        return math.exp(-self.log_likelihood / len(self.token_ids)) if self.token_ids else math.nan

    def to_dict(self) -> dict[str, object]:
        """Return everything as JSON holds it; one entry a token."""
        return {
            "text": self.text,
            "finished": self.finished,
            "log_likelihood": self.log_likelihood,
            "log_mean_likelihood": self.log_mean_likelihood,
            "tokens": [
                {
                    "token": token,
                    "id": number,
                    "log_prob": float(self.log_probs[t]),
                    "entropy": float(self.entropy[t]),
                    "mutual_information": float(self.mutual_information[t]),
                    "alternatives": [{"token": text, "prob": p} for text, p in self.alternatives[t]],
                }
                for t, (token, number) in enumerate(zip(self.tokens, self.token_ids, strict=True))
            ],
        }


@final
@dataclass(frozen=True)
class Answers:
    """Several answers to one prompt, each from a draw of its own.

    Attributes:
        answers: The N answers; each one's log-probabilities are those of its own draw.
        draws: Number of the draw of each.
        groups: Number of each answer's semantic cluster, the answers that mean the same; 0 is the first answer's.
    """

    answers: tuple[Answer, ...]
    draws: tuple[int, ...]
    groups: tuple[int, ...]

    @classmethod
    def of(cls, answers: tuple[Answer, ...], draws: tuple[int, ...], same: Equivalence | None = None) -> Answers:
        """Return answers in semantic clusters.

        Args:
            answers: The answers.
            draws: Number of the draw of each.
            same: Whether two texts mean the same; None for equality after case, articles and signs are dropped.
        """
        return cls(answers, draws, semantic_clusters([a.text for a in answers], same or exactly))

    @property
    def shares(self) -> Float[Tensor, " G"]:
        """Share of the answers in each semantic cluster."""
        return torch.bincount(torch.tensor(self.groups)).float() / len(self.groups)

    @property
    def semantic_entropy(self) -> float:
        """Entropy of the clusters' shares, in nats (Farquhar et al. 2024, the discrete estimate)."""
        return float(torch.special.entr(self.shares).sum())

    @property
    def predictive_entropy(self) -> float:
        """Mean of −log p of the answers under their draws: the Monte Carlo estimate of the entropy of texts."""
        return -sum(a.log_likelihood for a in self.answers) / len(self.answers)

    def best(self, utility: Callable[[str, str], float] = overlap) -> Answer:
        """Return the answer with the highest mean utility against all answers (minimum Bayes risk).

        Args:
            utility: How good a text (first) is where another (second) is right; the F1 of their words unless given.

        Returns:
            One of the answers; of equal ones the first.
        """
        texts = [a.text for a in self.answers]
        scores = [sum(utility(text, other) for other in texts) for text in texts]
        return self.answers[max(range(len(scores)), key=scores.__getitem__)]
