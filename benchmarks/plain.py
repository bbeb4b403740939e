"""The plain way, as in research scripts: full logits, padded batches of 16 in the file's order, a sequence a choice."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from bayeslora.tasks.templates import answer_text, render, resolve_format
from bayeslora.tasks.types import Split

BATCH = 16


def plain_logits(model: Any, tokenizer: Any, split: Split, readout: str) -> torch.Tensor:
    """Return the choices' logits of a batch as plain scripts compute them: full logits, one sequence a choice."""
    form = resolve_format(split.format, readout)
    prompts = [render(e, form) for e in split]
    if readout == "letters":
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        logits = model(**batch, use_cache=False).logits[:, -1].float()
        letters = [tokenizer(answer_text(split.examples[0], i, readout))["input_ids"][-1] for i in range(4)]
        return logits[:, letters]
    texts, starts, owners = [], [], []
    for number, (prompt, example) in enumerate(zip(prompts, split, strict=True)):
        for i in range(len(example.choices)):
            texts.append(prompt + answer_text(example, i, readout))
            starts.append(len(tokenizer(prompt)["input_ids"]))
            owners.append(number)
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    log_p = model(**batch, use_cache=False).logits.float().log_softmax(-1)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    tokens = log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    answer = mask[:, 1:] & (torch.arange(1, ids.shape[1]) >= torch.tensor(starts)[:, None])
    scores = tokens.masked_fill(~answer, 0).sum(1)
    widest = max(len(e.choices) for e in split)
    found = torch.full((len(split), widest), -torch.inf)
    at = 0
    rows = []
    for example in split:
        rows.append(
            functional.pad(scores[at : at + len(example.choices)], (0, widest - len(example.choices)), value=-torch.inf)
        )
        at += len(example.choices)
    return torch.stack(rows) if rows else found


def batches_of(split: Split, size: int = BATCH) -> list[Split]:
    """Return the split in batches of sixteen rows, in the order of the file."""
    return [split.take(range(i, min(i + size, len(split)))) for i in range(0, len(split), size)]
