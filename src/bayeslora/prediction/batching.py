"""Examples as a batch for a causal language model: prompts with their choices, and where the answers are read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from bayeslora._typing import Float, Int
from bayeslora.prediction.encoding import Encoded

Batch = dict[str, Tensor]
READ = ("readout_keep", "readout_row", "readout_token", "readout_slot", "readout_shape", "readout_weight")
"""The tensors of a batch that are not for the model; see `choice_batch`."""


def choice_batch(rows: Sequence[Encoded], padding: int, *, shared: bool, dtype: torch.dtype) -> Batch:
    """Return the model's inputs for prompts followed by choices, and where the choices' tokens are predicted.

    The choices follow one ``shared`` copy of their prompt, under an additive attention mask, or each has its own.
    Prediction q is of token ``readout_token[q]`` at kept position ``readout_row[q]``, and counts with
    ``readout_weight[q]`` for choice ``readout_slot[q]`` = b·C + c; ``readout_keep`` are positions row · T + column.
    """
    choices = max(len(row.answers) for row in rows)
    layout = _Layout(shared)
    for b, row in enumerate(rows):
        slots = range(b * choices, b * choices + len(row.answers))
        layout.add(row.prompt, row.answers, slots, row.scales or [1.0] * len(slots))
        if row.neutral:
            layout.add(row.neutral, row.neutral_answers, slots, [-1.0] * len(slots), joined=shared)
    longest = max(map(len, layout.sequences))
    ids = torch.tensor([s + [padding] * (longest - len(s)) for s in layout.sequences])
    segment = torch.tensor([s + [-1] * (longest - len(s)) for s in layout.segments])
    root = torch.tensor([s + [0] * (longest - len(s)) for s in layout.roots])
    branches = shared and bool((segment > 1).any() or root.any())
    row_, token_, slot_ = torch.tensor(layout.predictions).unbind(1)
    batch = {
        "input_ids": ids,
        "attention_mask": _branch_mask(segment, dtype, root) if branches else (segment >= 0).long(),
        "position_ids": torch.tensor([p + [0] * (longest - len(p)) for p in layout.positions]),
        "readout_keep": torch.tensor([b * longest + t for b, t in layout.keep]),
        "readout_row": row_,
        "readout_token": token_,
        "readout_slot": slot_,
        "readout_shape": torch.tensor([len(rows), choices]),
    }
    if any(row.scales or row.neutral for row in rows):
        batch["readout_weight"] = torch.tensor(layout.weights)
    return batch


@final
class _Layout:
    """Sequences of prompts with the answers that follow them, as branches after one prompt where that is shared."""

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.sequences: list[list[int]] = []
        self.segments: list[list[int]] = []
        self.roots: list[list[int]] = []
        self.positions: list[list[int]] = []
        self.keep: list[tuple[int, int]] = []
        self.predictions: list[tuple[int, int, int]] = []
        self.weights: list[float] = []

    def add(
        self,
        prompt: Sequence[int],
        answers: Sequence[Sequence[int]],
        slots: Sequence[int],
        weights: Sequence[float],
        *,
        joined: bool = False,
    ) -> None:
        """Add a prompt with its answers: a sequence, one for each answer, or joined to the last sequence unseen."""
        apart = not self.shared and any(len(a) > 1 for a in answers)
        root = last = 0
        for answer, slot, weight in zip(answers, slots, weights, strict=True):
            if slot == slots[0] or apart:
                if not joined:
                    for columns in (self.sequences, self.segments, self.roots, self.positions):
                        columns.append([])
                root, last = max(self.segments[-1], default=-1) + 1, len(self.keep)
                self._put(prompt, root, root, 0)
            self._predict(last, answer[0], slot, weight)
            branch = max(self.segments[-1]) + 1
            for k, (token, following) in enumerate(pairwise(answer)):
                self._put((token,), branch, root, len(prompt) + k)
                self._predict(len(self.keep) - 1, following, slot, weight)

    def _put(self, tokens: Sequence[int], segment: int, root: int, position: int) -> None:
        """Put tokens in a row at the end of the last sequence, and keep the place of the last of them."""
        self.sequences[-1] += tokens
        self.segments[-1] += [segment] * len(tokens)
        self.roots[-1] += [root] * len(tokens)
        self.positions[-1] += range(position, position + len(tokens))
        self.keep.append((len(self.sequences) - 1, len(self.sequences[-1]) - 1))

    def _predict(self, place: int, token: int, slot: int, weight: float) -> None:
        """Note that a token of an answer is predicted at a kept place."""
        self.predictions.append((place, token, slot))
        self.weights.append(weight)


def _branch_mask(segment: Int[Tensor, "B T"], dtype: torch.dtype, root: Int[Tensor, "B T"]) -> Float[Tensor, "B 1 T T"]:
    """Return the additive attention mask: a position sees what came before in its prompt (root) and in its segment."""
    looked = segment[:, None, :]
    allowed = ((looked == root[:, :, None]) | (looked == segment[:, :, None])).tril()
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def on(batch: Batch, device: torch.device) -> Batch:
    """Return a batch on a device, without the labels."""
    return {key: value.to(device) for key, value in batch.items() if key not in ("labels", "shift_labels")}


def schedule(lengths: Sequence[int], token_budget: int, most: int, padding: int) -> dict[int, list[list[int]]]:
    """Return batches of places in ``lengths`` by the draws that share a pass: ``most``, or fewer for long examples.

    Budget and ``padding`` (see `grouped`) hold for all draws of a batch; a single longer example under a single draw is
    its own batch.
    """
    widths = sorted({-(-most // 2**k) for k in range(most.bit_length() + 1)}, reverse=True)
    places: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        width = next((w for w in widths if w * length <= token_budget), 1)
        places.setdefault(width, []).append(place)
    return {
        width: [
            [wide[i] for i in batch]
            for batch in grouped([lengths[p] for p in wide], token_budget // width, padding // width)
        ]
        for width, wide in places.items()
    }


def grouped(lengths: Sequence[int], token_budget: int, padding: int) -> list[list[int]]:
    """Return places in batches of similar length, the longest first: under a token budget, in which padding counts.

    A batch ends where it would hold more than so much padding too: from there on a batch of its own costs less.
    """
    batches: list[list[int]] = []
    padded = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batches[-1][0]] if batches else 0
        padded += longest - lengths[i]
        if not batches or (len(batches[-1]) + 1) * longest > token_budget or padded > padding:
            batches.append([])
            padded = 0
        batches[-1].append(i)
    return batches
