"""How an answer is read from a model: batches go in, logits [B C] come out, in training as in prediction.

A choice's logit is the log-likelihood of its tokens after the prompt, times a factor if the format normalises it. Where
every choice is a single token the normaliser over the vocabulary is the same for all and is left out. Longer choices
share the pass over their prompt: all follow it in one sequence, at the positions they would have, and see the prompt
and themselves only. A neutral prompt is one more in the same sequence, and sees nothing of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import ModelOutput

from bayeslora._typing import Float, Tokenizer
from bayeslora.errors import InputError
from bayeslora.params import device_of, evaluating, generator, require_lora
from bayeslora.prediction.batching import READ, Batch, choice_batch, on
from bayeslora.prediction.encoding import Encoded, encode, tokenizer_of
from bayeslora.prediction.probes import tried
from bayeslora.tasks.types import Split

Args = tuple[object, ...]


@final
@dataclass(frozen=True)
class Readout:
    """How answers are read from one model."""

    name: Literal["letters", "likelihood", "head"]
    tokenizer: Tokenizer
    limit: int | None  # most tokens that the model reads at once
    shared: bool  # whether choices of several tokens share the pass over their prompt
    dtype: torch.dtype  # of the model's activations, for the attention mask of shared passes

    def encode(self, split: Split) -> tuple[list[Encoded], int]:
        """Return the split as token ids, and how many prompts were cut; see `bayeslora.prediction.encoding.encode`."""
        return encode(split, self.tokenizer, self.name, self.limit)

    def length(self, row: Encoded) -> int:
        """Return how many tokens of the batch an example takes."""
        parts = [(row.prompt, row.answers), (row.neutral, row.neutral_answers)][: 2 if row.neutral else 1]
        tails = [[len(a) - 1 for a in answers] for _, answers in parts]
        prompts = [len(prompt) for prompt, _ in parts]
        if self.shared or (len(parts) == 1 and not any(tails[0])):
            return sum(prompts) + sum(map(sum, tails))
        sequences = sum(len(tail) if any(tail) else 1 for tail in tails)
        return sequences * max(n + max(tail) for n, tail in zip(prompts, tails, strict=True))

    def sequences(self, row: Encoded) -> int:
        """Return how many sequences of the batch an example without a neutral prompt takes."""
        apart = not self.shared and any(len(answer) > 1 for answer in row.answers)
        return len(row.answers) if apart else 1

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        """Return a batch for the model, padded on the right to its longest row."""
        labels = torch.tensor([row.label for row in rows])
        if self.name == "head":
            ids = {"input_ids": [list(row.prompt) for row in rows]}
            batch: Batch = dict(self.tokenizer.pad(ids, padding_side="right", return_tensors="pt"))
            return {**batch, "labels": labels}
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        # the Trainer counts examples by `shift_labels`: language models' `labels` would be counted one short
        return {
            **choice_batch(rows, padding, shared=self.shared, dtype=self.dtype),
            "labels": labels,
            "shift_labels": labels,
        }

    @contextmanager
    def attached(self, model: nn.Module, read: Callable[[Tensor, Batch], Tensor] | None = None) -> Iterator[None]:
        """Make ``model(**batch).logits`` the choices' logits [B C], or what ``read`` makes of the kept positions.

        A pass without the batch's ``readout_`` tensors stays as it is, so a callback may predict or generate.
        """
        if self.name == "head":
            yield
            return
        peft = require_lora(model)
        head = peft.get_base_model().get_output_embeddings()
        positions: Batch = {}
        size = 0

        def before(_: nn.Module, args: Args, kwargs: dict[str, Any]) -> tuple[Args, dict[str, Any]]:
            """Take what is not for the model out of its arguments."""
            nonlocal size
            positions.clear()
            positions.update({key: kwargs.pop(key) for key in READ if key in kwargs})
            if not positions:
                return args, kwargs
            for key in ("labels", "shift_labels", "num_items_in_batch"):
                kwargs.pop(key, None)
            size = kwargs["input_ids"].numel()
            return args, {**kwargs, "use_cache": False}

        def narrow(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            """Give the head the positions that predict an answer's token, for each stacked draw."""
            if not positions:
                return args
            states = args[0].reshape(-1, size, args[0].shape[-1])  # one row for each draw
            return states[:, positions["readout_keep"].to(states.device)].flatten(0, 1), *args[1:]

        def after(_: nn.Module, args: Args, outputs: ModelOutput) -> ModelOutput:
            """Return the choices' logits in the place of the model's."""
            if not positions:
                return outputs
            logits = (read or choice_logits)(outputs.logits, positions)
            positions.clear()  # a call of the base model itself, without these hooks' batch, stays as it is
            return SequenceClassifierOutput(logits=logits)

        with (
            peft.register_forward_pre_hook(before, with_kwargs=True),
            head.register_forward_pre_hook(narrow),
            peft.register_forward_hook(after),
        ):
            yield


def readout_for(model: nn.Module, split: Split, tokenizer: Tokenizer | None = None) -> Readout:
    """Return how a split's answers are read from a model: as its format says, or by the model where it says auto."""
    peft = require_lora(model)
    base = peft.get_base_model()
    classifier = "ForSequenceClassification" in type(base).__name__
    name = split.format.readout
    if name == "auto":
        name = "head" if classifier else ("likelihood" if split.classes else "letters")
    if (name == "head") != classifier:
        raise InputError(
            f"the readout {name!r} does not fit a {type(base).__name__}; "
            + ("use readout='head'" if classifier else "load it with AutoModelForSequenceClassification")
        )
    if not classifier and base.get_output_embeddings() is None:
        raise InputError(f"a {type(base).__name__} has no language model head; load a causal language model")
    tokenizer = tokenizer if tokenizer is not None else tokenizer_of(peft)
    if name == "head":
        if split.classes is None:
            raise InputError(
                f"{split.name} has choices that change from row to row; a classification head cannot "
                "answer it, use a causal language model"
            )
        if base.config.num_labels != len(split.classes):
            raise InputError(
                f"{split.name} has {len(split.classes)} classes, the model's head {base.config.num_labels}; "
                f"load the model with num_labels={len(split.classes)}"
            )
        return head_readout(base, tokenizer, "classification")
    neutral = split.format.normalisation == "unconditional"
    shared = name == "likelihood" and tried(
        peft, ("branches", neutral), lambda: _shares_prompts(peft, base, tokenizer, neutral)
    )
    return Readout(name, tokenizer, token_limit(base, tokenizer), shared, base.dtype)


def head_readout(base: PreTrainedModel, tokenizer: Tokenizer, kind: str) -> Readout:
    """Return the readout of a model with a head of some kind, which needs a padding token."""
    if base.config.pad_token_id is None or tokenizer.pad_token_id is None:
        raise InputError(f"a {kind} head needs a padding token; set tokenizer.pad_token and model.config.pad_token_id")
    return Readout("head", tokenizer, token_limit(base, tokenizer), False, base.dtype)


def token_limit(base: PreTrainedModel, tokenizer: Tokenizer) -> int | None:
    """Return the most tokens that a model reads at once; None if it names no limit."""
    bounds = (getattr(base.config, "max_position_embeddings", None), tokenizer.model_max_length)
    return min((n for n in bounds if n is not None and n < 10**9), default=None)


def choice_logits(logits: Float[Tensor, "SP V"], positions: Batch) -> Float[Tensor, "SB C"]:
    """Return the choices' log-likelihoods by the head's output at the kept positions, up to a constant per example.

    Float32; minus infinity for choices that an example does not have. The positions are the ``readout_`` tensors of a
    batch, whose rows have passed once for each of S stacked draws.
    """
    row, token, slot = (positions[f"readout_{key}"].to(logits.device) for key in ("row", "token", "slot"))
    weight = positions.get("readout_weight")
    rows, choices = positions["readout_shape"].tolist()
    values = logits.view(-1, len(positions["readout_keep"]), logits.shape[-1])[:, row, token].float()
    if weight is not None or len(row) > len(torch.unique(slot)):  # the normaliser is not the same for all choices
        values = values - _log_normaliser(logits).view(len(values), -1)[:, row]
    if weight is not None:
        values = values * weight.to(logits.device)
    filled = values.new_zeros(len(values), rows * choices).index_add(1, slot, values)
    present = torch.zeros(rows * choices, dtype=torch.bool, device=values.device).index_fill(0, slot, True)
    return filled.masked_fill(~present, -torch.inf).view(-1, choices)


def _log_normaliser(logits: Float[Tensor, "P V"]) -> Float[Tensor, " P"]:
    """Return logsumexp over the vocabulary in float32, in blocks whose float32 copies fit a CPU's cache."""
    size = (2**18 if logits.device.type == "cpu" else 2**26) // logits.shape[1]
    return torch.cat([block.float().logsumexp(-1) for block in torch.split(logits, max(1, size))])


@torch.no_grad()
def _shares_prompts(peft: nn.Module, base: PreTrainedModel, tokenizer: Tokenizer, neutral: bool) -> bool:
    """Try on the model itself whether branches after one prompt give what separate sequences give."""
    config = base.config
    if getattr(config, "_attn_implementation", None) not in ("eager", "sdpa"):
        return False
    vocabulary = len(base.get_input_embeddings().weight)
    ids = torch.randint(0, min(vocabulary, 1000), (9,), generator=generator("branches")).tolist()
    rows = [Encoded(tuple(ids[:4]), ((ids[4], ids[5], ids[6]), (ids[7], ids[8], ids[4])), 0)]
    if neutral:
        rows = [replace(rows[0], neutral=tuple(ids[5:7]), neutral_answers=rows[0].answers)]
    logits = []
    with evaluating(peft):
        for shared in (True, False):
            readout = Readout("likelihood", tokenizer, None, shared, base.dtype)
            with readout.attached(peft, lambda logits, positions: logits[positions["readout_row"].to(logits.device)]):
                logits.append(peft(**on(readout.collate(rows), device_of(peft))).logits.float())
    return bool((logits[0] - logits[1]).abs().max() <= 0.05 * logits[1].std())
