"""Loading a base model with a fresh LoRA adapter and its tokenizer, with what is fast on the machine."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import PreTrainedModel

from bayeslora._typing import Tokenizer
from bayeslora.errors import InputError

_ADAPTED = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?A(?:\.weight)?")
"""The name on disk of an adapted layer's matrix A."""


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """Return bfloat16 where the device multiplies it in hardware, else float32; some models overflow in float16."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if kind == "cpu":
        capable = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        has = any(capable.get(name, False) for name in ("amx_bf16", "avx512_bf16", "amx_tile", "bf16"))
        return torch.bfloat16 if has else torch.float32
    return torch.float32


def default_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def cache_argument(call: Callable[..., object]) -> str:
    """Return a model's argument for what it keeps: ``cache``, in older releases of transformers one of two others."""
    known = inspect.signature(call).parameters
    return next((name for name in ("cache", "cache_params") if name in known), "past_key_values")


def load_model(
    name: str | Path,
    classes: Sequence[str] | None = None,
    *,
    readout: str = "auto",
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    device: torch.device | str | None = None,
    adapter: LoraConfig | None = None,
) -> tuple[PeftModel, Tokenizer]:
    """Load a model with a fresh LoRA adapter, and its tokenizer.

    Args:
        name: Folder, or repository on the Hub.
        classes: Class names for a classification head; needed for models that are not causal language models.
        readout: ``head`` asks for a classification head on a causal language model too.
        rank: Rank r of the adapter.
        alpha: LoRA's α; updates are scaled by α / r.
        dropout: LoRA's dropout.
        target_modules: Names of the layers to adapt; None for PEFT's choice for the architecture.
        dtype: Dtype of the base model; None for `fast_dtype`. The adapter is float32.
        attention: Attention implementation of transformers; None for ``eager`` on the CPU, where its backward pass is
            faster, and transformers' choice elsewhere.
        device: Where to put the model; None for the accelerator if there is one.
        adapter: The whole configuration of the adapter, such as `adapter_of` gives of a posterior's; ``rank``,
            ``alpha``, ``dropout`` and ``target_modules`` are then not looked at.

    Returns:
        The model and the tokenizer.

    Raises:
        InputError: If the model cannot be loaded, or classes are missing.
    """
    target = torch.device(device) if device is not None else default_device()
    options: dict[str, object] = {"dtype": dtype or fast_dtype(target)}
    if attention or target.type == "cpu":
        options["attn_implementation"] = attention or "eager"
    base, tokenizer, causal = _base(name, classes, readout, options)
    lora = adapter or LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules) if target_modules else None,
        task_type="CAUSAL_LM" if causal else "SEQ_CLS",
    )
    try:
        model = get_peft_model(base, lora)
    except Exception as error:  # PEFT raises any kind for a configuration that does not fit
        raise InputError(f"the adapter does not fit {name}: {_first(error)}") from error
    return model.to(target), tokenizer


def _base(
    name: str | Path, classes: Sequence[str] | None, readout: str, options: Mapping[str, object]
) -> tuple[PreTrainedModel, Tokenizer, bool]:
    """Return the base model, its tokenizer, both with a padding token, and whether it is a causal language model."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    with _loading(name):
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    causal = any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in config.architectures or ()) and readout != "head"
    if not causal and not classes:
        raise InputError(
            f"{name} answers by a classification head, and the task has no classes; use a causal language model for "
            "multiple choice"
        )
    labels: dict[str, object] = {}
    if not causal:
        numbers = {label: k for k, label in enumerate(classes or ())}
        labels = {"label2id": numbers, "id2label": {k: label for label, k in numbers.items()}}
        labels["ignore_mismatched_sizes"] = True  # a head of other classes makes way for a new one
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    with _loading(name):
        base = kind.from_pretrained(name, **options, **labels)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if base.config.pad_token_id is None:
        base.config.pad_token_id = tokenizer.pad_token_id
    return base, tokenizer, causal


def adapter_of(config: Mapping[str, object], names: Collection[str] = ()) -> LoraConfig:
    """Return the configuration that ``adapter_config.json`` holds, without the keys that this PEFT lacks.

    Args:
        config: The configuration.
        names: The adapter's parameters by their names on disk; if given, the layers are those, and no regular
            expression of the configuration, which may take for ever, says which they are.

    Returns:
        The configuration, for training.

    Raises:
        InputError: If PEFT does not take it.
    """
    known = {f.name for f in fields(LoraConfig) if f.init}
    values = {k: v for k, v in config.items() if k in known} | {"inference_mode": False}
    layers = {found[1] for name in names if (found := _ADAPTED.fullmatch(name))}
    if layers and isinstance(values.get("target_modules"), str):
        values["target_modules"] = sorted(layers)
    if layers and isinstance(values.get("exclude_modules"), str):
        values["exclude_modules"] = None
    try:
        return LoraConfig(**values)
    except Exception as error:  # of any kind: the values are a file's
        raise InputError(f"the adapter's configuration is none of LoRA's: {_first(error)}") from error


def _first(error: Exception) -> str:
    """Return the first line of what an exception says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def _loading(name: str | Path) -> Iterator[None]:
    """Raise a failure to load a model as one sentence."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"the model {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
