"""What a run and a prediction depend on, and the key by which they are found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from torch import nn
from transformers import TrainingArguments

from bayeslora.params import require_lora
from bayeslora.posteriors.provenance import origin_of
from bayeslora.tasks.types import Split

VERSION = 1
"""To be raised when what is learned from the same inputs changes, so that older results are not taken for it."""
_IDLE = (
    *("output_dir", "seed", "data_seed", "run_name", "report_to", "disable_tqdm", "use_cpu", "resume_from_checkpoint"),
    *("do_train", "do_eval", "do_predict", "prediction_loss_only", "per_device_eval_batch_size", "project", "debug"),
    *("skip_memory_metrics", "torch_empty_cache_steps", "enable_jit_checkpoint", "ignore_data_skip", "local_rank"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
)
"""Arguments of the Trainer that do not change what is learned; the seed has a place of its own."""
_IDLE_GROUPS = ("logging_", "log_", "hub_", "push_to_hub", "trackio_", "include_", "ddp_")
_CHOOSING = ("eval_", "save_", "metric_for_best_model", "greater_is_better")
"""Arguments that matter only where the best of several states is kept."""
_PLACES = ("base_model_name_or_path", "inference_mode", "peft_version", "revision", "auto_mapping")
"""What an adapter's configuration says beside its shape; the base model is known by its fingerprint."""


def key_of(parts: Mapping[str, Any]) -> str:
    """Return a key for what something depends on.

    Args:
        parts: What it depends on, ready for JSON.

    Returns:
        Twelve hexadecimal digits.
    """
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def of_model(model: nn.Module) -> dict[str, Any]:
    """Return what a run depends on of the model: base, dtype, quantisation, and the adapter's shape.

    Args:
        model: PEFT model.

    Returns:
        Parts of a key; the adapter's present weights are none.
    """
    origin, base = origin_of(model), require_lora(model).get_base_model()
    quantised = getattr(base.config, "quantization_config", None)
    return {
        "base": dict(origin.fingerprint),
        "dtype": str(base.dtype),
        "quantised": json.loads(json.dumps(quantised, default=lambda one: getattr(one, "__dict__", str(one)))),
        "adapter": {k: v for k, v in origin.adapter_config.items() if k not in _PLACES},
    }


def of_rows(split: Split | None, tokenizer: Any = None) -> str | None:
    """Return a digest of a split's rows and of how they are put to the model.

    Args:
        split: The split; its name does not count.
        tokenizer: The model's tokenizer, known by what it makes of the first row.

    Returns:
        Hexadecimal digits; None for no split.
    """
    if split is None:
        return None
    rows = [[e.text, e.choices, e.label, e.columns] for e in split]
    tokens = None if tokenizer is None or not rows else list(tokenizer(split.examples[0].text)["input_ids"])
    text = json.dumps([rows, asdict(split.format), split.classes, tokens])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def of_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the Trainer's arguments on which it depends what is learned.

    Args:
        args: The arguments.

    Returns:
        Those that are not the defaults, without folders, logs, trackers and loaders, and what the processes make of the
        size of a batch.
    """
    idle = _IDLE_GROUPS if args.load_best_model_at_end else (*_IDLE_GROUPS, *_CHOOSING)
    defaults = {f.name: f.default for f in fields(TrainingArguments)}
    found = {
        name: value
        for name, value in args.to_dict().items()
        if name not in _IDLE and not name.startswith(idle) and value != defaults.get(name)
    }
    found["batch"], found["processes"] = args.train_batch_size, args.world_size
    kept: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return kept


def difference(own: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names of what differs between two sets of parts.

    Args:
        own: One.
        other: The other.

    Returns:
        Names, those inside an object as ``object.name``.
    """
    found = []
    for name in sorted(own.keys() | other.keys()):
        mine, theirs = own.get(name), other.get(name)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found += [f"{name}.{inner}" for inner in difference(mine, theirs)]
        elif mine != theirs:
            found.append(name)
    return found
