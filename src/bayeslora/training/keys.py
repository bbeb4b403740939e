"""What a run and a prediction depend on, and the key by which they are found again.

A key holds everything that can change a number by more than rounding. What it leaves out is named here, with the
reason: `IDLE_ARGUMENTS` of the Trainer and `VOLATILE` parts of configurations; beside them splits' names and true
probabilities, which nothing is learned from, and the package's version, in whose place `VERSION` stands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import TypeVar

import torch
from torch import nn
from transformers import TrainingArguments

from bayeslora._typing import Tokenizer
from bayeslora.methods import Inference
from bayeslora.methods.base import LATER, settings
from bayeslora.params import Params, is_new_head, lora_parameters, require_lora
from bayeslora.posteriors.provenance import origin_of
from bayeslora.prediction.encoding import tokenizer_of
from bayeslora.tasks.types import Split, Task

T = TypeVar("T")
Parts = dict[str, object]
"""What something depends on, ready for JSON."""

VERSION = 1
"""To be raised when what is learned from the same inputs changes, so that older results are not taken for it."""
IDLE_ARGUMENTS = (
    # places, and what is noted there; the seed has a place of its own in the key
    *("output_dir", "seed", "data_seed", "run_name", "report_to", "project", "disable_tqdm", "debug"),
    # what is done beside training, and how it is gone on with
    *("do_train", "do_eval", "do_predict", "prediction_loss_only", "per_device_eval_batch_size"),
    *("resume_from_checkpoint", "enable_jit_checkpoint", "ignore_data_skip"),
    # where it is computed, which is the same up to rounding, and how the memory is kept
    *("use_cpu", "local_rank", "skip_memory_metrics", "torch_empty_cache_steps"),
    # how rows are brought to the model, in the same order
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
)
"""Arguments of the Trainer that do not change what is learned."""
IDLE_BEGINNINGS = ("logging_", "log_", "hub_", "push_to_hub", "trackio_", "include_", "ddp_")
"""How groups of such arguments begin: logs, uploads, and how processes talk to each other."""
CHOOSING = ("eval_", "save_", "metric_for_best_model", "greater_is_better")
"""Arguments that matter only where the best of several states is kept."""
VOLATILE = (
    # names and places: a model is known by its weights
    *("base_model_name_or_path", "_name_or_path", "revision", "auto_mapping", "id2label", "label2id"),
    # what transformers and PEFT note or set while they work
    *("inference_mode", "peft_version", "transformers_version", "use_cache", "problem_type", "quantization_config"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "dtype", "torch_dtype"),
)
"""Parts of the model's and the adapter's configuration that are no part of a key, or have another place in it."""
_SAMPLED = 16
"""How many weights of each of the model's tensors are looked at."""


def key_of(parts: Mapping[str, object]) -> str:
    """Return twelve hexadecimal digits for what something depends on."""
    return _digest({"version": VERSION, **parts}, 12)


def inputs(model: nn.Module, task: Task, tokenizer: Tokenizer | None) -> Parts:
    """Return what every run on a model and a task depends on; without a tokenizer it is the model's."""
    return {
        "train": of_rows(task.train),
        "validation": of_rows(task.validation),
        "model": of_model(model),
        "tokenizer": of_tokenizer(tokenizer or tokenizer_of(model)),
    }


def of_method(method: Inference) -> Parts:
    """Return a method's name and settings, and the class if it is not one of ours.

    A setting that came later (`methods.base.LATER`) is left out at its default, so that what was made before it serves.
    """
    kind = type(method)
    assert is_dataclass(method)
    usual = {f.name for f in fields(method) if f.metadata == LATER and getattr(method, f.name) == f.default}
    values = {name: value for name, value in settings(method).items() if name not in usual}
    elsewhere = {} if kind.__module__.startswith("bayeslora.") else {"class": f"{kind.__module__}.{kind.__qualname__}"}
    return {"name": method.name, **_plain(values), **elsewhere}


def of_model(model: nn.Module) -> Parts:
    """Return what a run depends on of a PEFT model, of which the adapter's present weights are no part."""
    peft = require_lora(model)
    base = peft.get_base_model()
    adapter, config = origin_of(model).adapter_config, base.config.to_dict()
    return {
        "weights": _digest_of_weights(model),
        "config": _digest({name: value for name, value in config.items() if name not in VOLATILE}),
        "dtype": str(base.dtype),
        "quantised": _plain(getattr(base.config, "quantization_config", None)),
        "adapter": {name: value for name, value in adapter.items() if name not in VOLATILE},
        "adapter dtype": sorted({str(p.dtype) for p in lora_parameters(model).values()}),
        "trainable": _digest(sorted(name for name, p in peft.named_parameters() if p.requires_grad)),
    }


def of_tokenizer(tokenizer: Tokenizer) -> str:
    """Return a digest of how a tokenizer makes tokens of a text; how it pads or cuts is left out, for we do that."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    rules = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    example = list(tokenizer("A test: 12.")["input_ids"])
    return _digest([type(tokenizer).__name__, rules, special, tokenizer.model_max_length, example])


def of_rows(split: Split | None) -> str | None:
    """Return a digest of a split's rows and of how they are put to the model; None for no split."""
    if split is None:
        return None
    rows = [[e.text, e.choices, e.label, e.columns] for e in split]
    return _digest([rows, asdict(split.format), split.classes])


def of_params(params: Params) -> str:
    """Return a digest of an adapter's numbers."""
    sha = hashlib.sha256()
    for name, value in sorted(params.items()):
        sha.update(name.encode())
        sha.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def of_arguments(args: TrainingArguments) -> Parts:
    """Return the Trainer's arguments that are not the defaults, without those on which nothing depends."""
    beginnings = IDLE_BEGINNINGS if args.load_best_model_at_end else (*IDLE_BEGINNINGS, *CHOOSING)
    defaults = {f.name: f.default for f in fields(TrainingArguments)}
    changed = {
        name: value
        for name, value in args.to_dict().items()
        if name not in IDLE_ARGUMENTS and not name.startswith(beginnings) and value != defaults.get(name)
    }
    return _plain({**changed, "batch": args.train_batch_size, "processes": args.world_size})


def difference(parts: Mapping[str, object], others: Mapping[str, object]) -> list[str]:
    """Return the names of what differs between two sets of parts, those inside an object as ``object.name``."""
    names = []
    for name in sorted(parts.keys() | others.keys()):
        one, other = parts.get(name), others.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            names += [f"{name}.{inner}" for inner in difference(one, other)]
        elif one != other:
            names.append(name)
    return names


def _digest_of_weights(model: nn.Module) -> str:
    """Return a digest of some weights of every tensor of the base, without those that a run draws anew."""
    peft = require_lora(model)
    redrawn = {id(p) for p in lora_parameters(model).values()}
    sha = hashlib.sha256()
    for name, p in sorted(peft.named_parameters()):
        if id(p) in redrawn or is_new_head(peft, name) or ".lora_" in name:
            continue
        sha.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        if p.device.type != "meta" and p.numel():
            flat = p.detach().reshape(-1)
            places = torch.linspace(0, len(flat) - 1, _SAMPLED, dtype=torch.float64).long().to(flat.device)
            sha.update(str(flat[places].float().tolist()).encode())
    return sha.hexdigest()[:16]


def _plain(value: T) -> T:
    """Return a value as JSON gives it back."""
    plain: T = json.loads(json.dumps(value, default=lambda one: getattr(one, "__dict__", str(one))))
    return plain


def _digest(value: object, digits: int = 16) -> str:
    """Return hexadecimal digits for what JSON can hold; what it cannot hold counts by its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:digits]
