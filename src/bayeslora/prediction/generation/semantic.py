"""Semantic clusters of texts: which of them mean the same, and how far apart they are."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from bayeslora._typing import Tokenizer
from bayeslora.errors import InputError

Equivalence = Callable[[str, str], bool]
"""Says whether two texts mean the same."""
_SIGNS = str.maketrans(dict.fromkeys(string.punctuation, " "))
_ARTICLES = {"a", "an", "the"}


def words(text: str) -> list[str]:
    """Return a text's words in lower case, without articles and signs."""
    return [word for word in text.lower().translate(_SIGNS).split() if word not in _ARTICLES]


def exactly(one: str, other: str) -> bool:
    """Say whether two texts are equal word for word, case, articles and signs aside."""
    return words(one) == words(other)


def overlap(one: str, other: str) -> float:
    """Return the F1 of two texts' words, 0 to 1, as question answering is scored; 1 for two empty texts."""
    first, second = Counter(words(one)), Counter(words(other))
    if not first or not second:
        return float(first == second)
    common = sum((first & second).values())
    return 2 * common / (sum(first.values()) + sum(second.values()))


def semantic_clusters(texts: Sequence[str], equivalent: Equivalence) -> tuple[int, ...]:
    """Return the number of each text's cluster: that of the first cluster whose first text means the same."""
    firsts: list[str] = []
    clusters = []
    for text in texts:
        number = next((g for g, first in enumerate(firsts) if equivalent(first, text)), len(firsts))
        if number == len(firsts):
            firsts.append(text)
        clusters.append(number)
    return tuple(clusters)


def by_entailment(model: PreTrainedModel, tokenizer: Tokenizer, context: str = "") -> Equivalence:
    """Return a judge of meaning: two texts say the same if each entails the other (Kuhn et al. 2023, section 3.2).

    Args:
        model: A sequence classifier for natural language inference, with a label named ``entailment``.
        tokenizer: Its tokenizer.
        context: Text put before both, such as the question.

    Returns:
        The judge.

    Raises:
        InputError: If no label of the model is named ``entailment``.
    """
    labels = {name.lower(): number for number, name in model.config.id2label.items()}
    if "entailment" not in labels:
        raise InputError(f"the model's labels are {sorted(labels)}; a judge of meaning needs one named 'entailment'")

    @torch.inference_mode()
    def same(one: str, other: str) -> bool:
        """Say whether each entails the other."""
        first, second = (f"{context} {text}".strip() for text in (one, other))
        pairs = tokenizer([first, second], [second, first], padding=True, truncation=True, return_tensors="pt")
        return bool((model(**pairs.to(model.device)).logits.argmax(-1) == labels["entailment"]).all())

    return same


def by_embedding(model: PreTrainedModel, tokenizer: Tokenizer, threshold: float = 0.85) -> Equivalence:
    """Return a judge of meaning: two texts say the same if their embeddings are close.

    Args:
        model: An encoder whose last hidden states [B T H] are averaged over the tokens.
        tokenizer: Its tokenizer.
        threshold: Smallest cosine of two embeddings that say the same.

    Returns:
        The judge.

    Raises:
        InputError: If the threshold is no cosine.
    """
    if not -1 <= threshold <= 1:
        raise InputError(f"threshold is a cosine, from -1 to 1, and it is {threshold}")

    @torch.inference_mode()
    def same(one: str, other: str) -> bool:
        """Say whether two texts' embeddings are close."""
        batch = tokenizer([one, other], padding=True, truncation=True, return_tensors="pt").to(model.device)
        states = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        first, second = (states * mask).sum(1) / mask.sum(1)
        return float(torch.cosine_similarity(first, second, dim=0)) >= threshold

    return same
