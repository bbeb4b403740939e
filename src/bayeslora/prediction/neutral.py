"""Choices after a neutral prompt: each different one is passed once for each draw, whatever the number of examples."""

from __future__ import annotations

from collections.abc import Sequence

from bayeslora.prediction.encoding import Encoded

AT_ONCE = 8
"""Choices that share a pass over their neutral prompt."""


def neutral_rows(rows: Sequence[Encoded]) -> tuple[list[Encoded], list[list[int]]]:
    """Return the different choices of some examples as rows of their own, after the neutral prompt.

    Each has `AT_ONCE` choices at most. The place of each example's choices among them all is row · `AT_ONCE` + choice.
    Their scores are log-likelihoods, also where all choices are single tokens.
    """
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    groups: list[tuple[tuple[int, ...], list[tuple[int, ...]]]] = []
    places = []
    for row in rows:
        row_places = []
        for answer in row.neutral_answers:
            key = (row.neutral, answer)
            if key not in known:
                if not groups or groups[-1][0] != row.neutral or len(groups[-1][1]) == AT_ONCE:
                    groups.append((row.neutral, []))
                groups[-1][1].append(answer)
                known[key] = (len(groups) - 1) * AT_ONCE + len(groups[-1][1]) - 1
            row_places.append(known[key])
        places.append(row_places)
    return [Encoded(prompt, tuple(a), -1, (1.0,) * len(a)) for prompt, a in groups], places
