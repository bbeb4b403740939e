"""Examples as a batch for a causal language model: prompts with their choices, and where the answers are read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from bayeslora._typing import Bool, Float
from bayeslora.engine.encode import Encoded

Batch = dict[str, Tensor]
READ = ("readout_keep", "readout_row", "readout_token", "readout_slot", "readout_shape")
"""The tensors of a batch that are not for the model; see `choice_batch`."""


def choice_batch(rows: Sequence[Encoded], padding: int, *, shared: bool, dtype: torch.dtype) -> Batch:
    """Return the model's inputs for prompts followed by choices, and where the choices' tokens are predicted.

    ``readout_keep`` [P] are flat positions (row · T + column) whose hidden states the head sees; prediction q is of
    token ``readout_token[q]`` at kept position ``readout_row[q]`` and counts for choice ``readout_slot[q]`` = b·C + c.

    Args:
        rows: Encoded examples with answers.
        padding: Token id to pad with.
        shared: Whether the choices follow one copy of their prompt; else each has its own.
        dtype: Dtype of the additive attention mask.

    Returns:
        The batch.
    """
    choices = max(len(row.answers) for row in rows)
    sequences: list[list[int]] = []
    segments: list[list[int]] = []
    positions: list[list[int]] = []
    keep: list[tuple[int, int]] = []
    predictions: list[tuple[int, int, int]] = []
    for b, row in enumerate(rows):
        own = not shared and any(len(a) > 1 for a in row.answers)
        for c, answer in enumerate(row.answers):
            if c == 0 or own:
                sequences.append(list(row.prompt))
                segments.append([0] * len(row.prompt))
                positions.append(list(range(len(row.prompt))))
                keep.append((len(sequences) - 1, len(row.prompt) - 1))
                last = len(keep) - 1
            predictions.append((last, answer[0], b * choices + c))
            for k, (token, following) in enumerate(pairwise(answer)):
                sequences[-1].append(token)
                segments[-1].append(c + 1)
                positions[-1].append(len(row.prompt) + k)
                keep.append((len(sequences) - 1, len(sequences[-1]) - 1))
                predictions.append((len(keep) - 1, following, b * choices + c))
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [padding] * (longest - len(s)) for s in sequences])
    segment = torch.tensor([s + [-1] * (longest - len(s)) for s in segments])
    row_, token_, slot_ = torch.tensor(predictions).unbind(1)
    return {
        "input_ids": ids,
        "attention_mask": branch_mask(segment, dtype)
        if shared and bool((segment > 1).any())
        else (segment >= 0).long(),
        "position_ids": torch.tensor([p + [0] * (longest - len(p)) for p in positions]),
        "readout_keep": torch.tensor([b * longest + t for b, t in keep]),
        "readout_row": row_,
        "readout_token": token_,
        "readout_slot": slot_,
        "readout_shape": torch.tensor([len(rows), choices]),
    }


def repeated(batch: Batch, count: int, *, inputs: bool = True) -> Batch:
    """Return a batch that has its rows several times, one copy after the other.

    Args:
        batch: What `Readout.collate` returns.
        count: How many times.
        inputs: Whether the model's inputs are repeated too, or only what is read from its output.

    Returns:
        The batch; the logits of copy k are rows k·B to (k+1)·B.
    """
    if count == 1:
        return batch
    found = {
        key: value.repeat(count, *[1] * (value.ndim - 1)) if inputs else value
        for key, value in batch.items()
        if key not in READ
    }
    if "readout_keep" in batch:
        rows, choices = batch["readout_shape"].tolist()
        steps = {
            "keep": batch["input_ids"].numel(),
            "row": len(batch["readout_keep"]),
            "token": 0,
            "slot": rows * choices,
        }
        for key, step in steps.items():
            value = batch[f"readout_{key}"]
            copies = step * torch.arange(count, device=value.device)
            found[f"readout_{key}"] = (value + copies[:, None]).flatten()
        found["readout_shape"] = torch.tensor([count * rows, choices])
    return found


def branch_mask(segment: Tensor, dtype: torch.dtype) -> Float[Tensor, "B 1 T T"]:
    """Return the additive attention mask of prompts (segment 0) with branches (1, 2, …) and padding (-1).

    Args:
        segment: Segment of each position [B T].
        dtype: Dtype of the mask.

    Returns:
        0 where a position may look: back, at its prompt and its own branch; the dtype's lowest number elsewhere.
    """
    length = segment.shape[1]
    asks, looked = segment[:, :, None], segment[:, None, :]
    back: Bool[Tensor, "T T"] = torch.ones(length, length, dtype=torch.bool).tril()
    allowed = back & ((looked == 0) | (looked == asks))
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    return mask[:, None]
