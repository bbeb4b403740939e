"""What a method that puts noise inside the adapter's layers can be used with."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from torch import nn, optim
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments

from bayeslora.errors import InputError
from bayeslora.params import require_lora


def plain_layers(model: nn.Module, method: str) -> dict[str, LoraLayer]:
    """Return the LoRA layers of the active adapter by name, or refuse one that does not call A and B."""
    peft = require_lora(model)
    adapter, config = peft.active_adapter, peft.active_peft_config
    layers = {n: m for n, m in peft.named_modules() if isinstance(m, LoraLayer) and adapter in m.scaling}
    for name, layer in layers.items():
        kind = None
        if config.use_dora:
            kind = "DoRA"
        elif adapter in layer.lora_variant:
            kind = type(layer.lora_variant[adapter]).__name__
        elif adapter in layer.lora_embedding_A:
            kind = "an adapted embedding"
        elif adapter not in layer.lora_A or type(layer).__name__ == "ParamWrapper":
            kind = "an adapted bare parameter"
        if kind is not None:
            raise InputError(
                f"{method} serves plain LoRA on modules, and {name} is {kind}; change the LoraConfig, or use "
                "swag or an ensemble, which serve every kind"
            )
    if not layers:
        raise InputError(f"the adapter {adapter!r} has no layer; check its target_modules")
    return layers


def check_training(args: TrainingArguments, model: nn.Module, optimizer: optim.Optimizer, method: str) -> None:
    """Refuse ways of training in which the steps of a method cannot be taken."""
    if args.deepspeed or "DeepSpeed" in type(optimizer).__name__:
        raise InputError(
            f"{method} cannot train under DeepSpeed, which takes the optimiser's step inside backward; use DDP "
            "(accelerate launch)"
        )
    kinds = {base.__name__ for group in optimizer.param_groups for p in group["params"] for base in type(p).__mro__}
    if "FlatParameter" in kinds:
        raise InputError(
            f"{method} cannot train under FSDP version 1, which flattens the adapter's matrices; use FSDP "
            "version 2 or DDP (accelerate launch)"
        )
    if "DTensor" in kinds and not isinstance(model, FSDPModule):
        raise InputError(
            f"{method} cannot train under tensor parallelism, where each process computes with a part of the adapter's "
            "matrices (DTensor); use DDP or FSDP version 2 (accelerate launch)"
        )
