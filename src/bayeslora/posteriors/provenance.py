"""Where a posterior comes from: adapter configuration, base model, method; and the check that a model is that base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from bayeslora.errors import InputError
from bayeslora.params import require_lora, whole
from bayeslora.posteriors.noise import PHILOX

_SKETCH = 64
"""How many weights of the base model are kept to recognise it."""


@dataclass(frozen=True)
class Origin:
    """What is written beside the tensors of a posterior.

    Attributes:
        adapter_config: PEFT's configuration of the adapter, ready for JSON.
        base_model: Name or path of the base model, as transformers knows it.
        fingerprint: What recognises the base model: see `fingerprint`.
        method: Name of the method that made the posterior.
        settings: The method's hyper-parameters, ready for JSON.
        num_data: Number of training examples N; None where it is not known.
        normalisation: What the likelihood readout's scores were set in relation to in training, see `Format`; None
            where it is not known, or answers were read in another way.
        noise: What draws are made from: see `bayeslora.posteriors.noise`.
        noise: What draws are made from: see `bayeslora.posteriors.noise`.
    """

    adapter_config: Mapping[str, Any]
    base_model: str
    fingerprint: Mapping[str, object]
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_data: int | None = None
    normalisation: str | None = None
    noise: str = PHILOX


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Return what recognises a base model in any dtype, on any device, quantised or not.

    Layer names are hashed, and a few weights of the layers that quantisation leaves alone (norms and the input
    embedding) are kept as up to 64 numbers, so that rounding can be told from another model.
    """
    base = require_lora(model).get_base_model()
    skip = ("lora_", "modules_to_save", "original_module")
    weights = {
        name.replace(".base_layer.", "."): p
        for name, p in base.named_parameters()
        if not any(part in name for part in skip) and name.split(".")[0] not in ("score", "classifier")
    }
    names = hashlib.sha256("\n".join(sorted(weights)).encode()).hexdigest()[:16]
    embedding = getattr(base, "get_input_embeddings", lambda: None)()
    plain = [p for name, p in sorted(weights.items()) if p.ndim == 1 and p.is_floating_point()]
    if isinstance(embedding, nn.Embedding):
        plain = [embedding.weight, *plain]
    sketch: list[float] = []
    for p in plain[: _SKETCH // 2]:
        flat = whole(p.detach()).reshape(-1)
        share = _SKETCH // 2 if not sketch else 1
        rows = torch.linspace(0, flat.numel() - 1, share + 2, dtype=torch.float64)[1:-1].long()
        sketch += [float(f"{v:.6g}") for v in flat[rows.to(flat.device)].float().tolist()]
    return {"names": names, "sketch": sketch[:_SKETCH]}


def origin_of(
    model: nn.Module, method: str = "", settings: Mapping[str, object] | None = None, num_data: int | None = None
) -> Origin:
    """Return the origin of a posterior over a model's active adapter that a method made of so many examples."""
    peft = require_lora(model)
    config = json.loads(json.dumps(peft.active_peft_config.to_dict(), default=sorted))  # PEFT has sets in it
    config["inference_mode"] = True
    base = peft.get_base_model()
    name = str(config.get("base_model_name_or_path") or getattr(base.config, "_name_or_path", "") or "")
    return Origin(config, name, fingerprint(peft), method, dict(settings or {}), num_data)


def check_base(origin: Origin, model: nn.Module) -> None:
    """Refuse a base model other than the one that a posterior was trained on; rounding is no other model."""
    here, there = fingerprint(model), origin.fingerprint
    trained_on = f"the posterior was trained on {origin.base_model or 'an unnamed model'}"
    if here["names"] != there.get("names"):
        raise InputError(f"{trained_on}, and this model has other layers; load that base model")
    a, b = torch.tensor(here["sketch"]), torch.tensor(there.get("sketch", []))
    near = a.shape == b.shape and ((a - b).abs() > 0.01 * torch.maximum(a.abs(), b.abs())).float().mean().item() <= 0.1
    if not near:
        raise InputError(f"{trained_on}, and this model has the same layers with other weights; load that base model")


def scored(origin: Origin, normalisation: str | None) -> Origin:
    """Return an origin that says how the likelihood readout's scores were normalised; a head's are not."""
    head = origin.adapter_config.get("task_type") == "SEQ_CLS"
    return replace(origin, normalisation=None if head else normalisation)


def check_scores(origin: Origin | None, normalisation: str | None, name: str) -> None:
    """Refuse examples whose answers would be scored in another way than in training, where both are known."""
    if origin is None or origin.normalisation is None or normalisation is None:
        return
    if origin.normalisation != normalisation:
        raise InputError(
            f"the posterior was trained with normalisation={origin.normalisation!r}, and {name} has {normalisation!r}; "
            f"load the task with normalisation={origin.normalisation!r}"
        )
