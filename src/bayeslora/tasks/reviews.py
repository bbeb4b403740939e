"""A generated data set whose true probabilities are known: short reviews, and whether their writer recommends the film.

Every review says three things about a film, each good or bad. k of them are good; the probability that the writer
recommends the film is (k + ⅓)/(3 + ⅔): 9, 36, 64 or 91 %. Labels are sampled so that among a split's reviews with the
same k that share says yes, up to rounding: a small test split then measures as a large one would. So a model that
knows what the words mean can learn the odds, and one that learns the labels by heart is over-confident by an amount
that can be measured. A model that always says one half is at a divergence of .21 nats from the truth. The sentences
of `review_ood` are about the weather, trains and people's wishes, and no review.
"""

from __future__ import annotations

import random

from bayeslora.tasks.synthetic import chance_ood, stream, task_of
from bayeslora.tasks.types import Example, Format, Split, Task

__all__ = ["review_ood", "review_task"]

FORMAT = Format(template="{text}", readout="head", kind="class")
CLASSES = ("no", "yes")

ASPECTS = (
    "plot", "acting", "music", "ending", "dialogue", "cast", "script", "pacing", "opening", "humour", "scenery",
    "direction",
)  # fmt: skip
GOOD = (
    "gripping", "clever", "moving", "brilliant", "charming", "superb", "delightful", "fresh", "witty", "elegant",
    "powerful", "wonderful", "touching", "excellent", "lively", "beautiful", "original", "splendid", "warm",
    "thrilling",
)  # fmt: skip
BAD = (
    "dull", "clumsy", "tedious", "awful", "lifeless", "poor", "annoying", "stale", "boring", "ugly", "weak",
    "terrible", "silly", "dreadful", "slow", "bland", "predictable", "messy", "cold", "pointless",
)  # fmt: skip
TEMPLATES = (
    "The {0} was {1}, the {2} {3} and the {4} {5}.",
    "I found the {0} {1}, the {2} {3} and the {4} {5}.",
    "A film whose {0} is {1}, whose {2} is {3} and whose {4} is {5}.",
    "About the {0}: {1}. The {2}: {3}. The {4}: {5}.",
)
STATEMENTS = 3


def review_task(train_rows: int = 200, validation_rows: int = 100, test_rows: int = 400, seed: int = 0) -> Task:
    """Generate the task ``reviews`` of two classes, with the true ``probs`` and a sampled ``label`` of each review."""
    return task_of("reviews", (train_rows, validation_rows, test_rows), seed, _split)


def review_ood(rows: int = 200, seed: int = 0) -> Split:
    """Generate the split ``reviews/ood``: sentences that are no reviews, without labels."""
    texts = (example.text for example in chance_ood(rows, seed))
    return Split("reviews/ood", tuple(Example(text, CLASSES) for text in texts), FORMAT, CLASSES)


def _split(name: str, rows: int, seed: int, seen: set[str]) -> Split:
    """Generate one split without the reviews in ``seen``, and add its own to them."""
    rng = stream(name, rows, seed)
    numbers = [row % (STATEMENTS + 1) for row in range(rows)]
    examples = [e for good in range(STATEMENTS + 1) for e in _reviews(rng, good, numbers.count(good), seen)]
    rng.shuffle(examples)
    return Split(name, tuple(examples), FORMAT, CLASSES)


def _reviews(rng: random.Random, good: int, rows: int, seen: set[str]) -> list[Example]:
    """Draw reviews with a number of good statements, and their writers' answers in the share that is true."""
    yes = (good + 1 / 3) / (STATEMENTS + 2 / 3)
    recommending = int(yes * rows + rng.random())
    labels = [1] * recommending + [0] * (rows - recommending)
    rng.shuffle(labels)
    return [Example(_text(rng, good, seen), CLASSES, label, (1 - yes, yes)) for label in labels]


def _text(rng: random.Random, good: int, seen: set[str]) -> str:
    """Draw a review that is not among those in ``seen``, and put it there."""
    while True:
        words = [*rng.sample(GOOD, good), *rng.sample(BAD, STATEMENTS - good)]
        rng.shuffle(words)
        pairs = zip(rng.sample(ASPECTS, STATEMENTS), words, strict=True)
        text = rng.choice(TEMPLATES).format(*(word for pair in pairs for word in pair))
        if text not in seen:
            seen.add(text)
            return text
