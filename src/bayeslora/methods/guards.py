"""What a method that puts noise inside the adapter's layers can be used with, and how it gets there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import TrainingArguments

from bayeslora.errors import InputError
from bayeslora.params import require_lora


def unpack_for_training(model: nn.Module) -> None:
    """Undo bitsandbytes' packing of 4-bit weights on the CPU, and keep it from packing them again.

    On CPUs with bfloat16 instructions ``Linear4bit`` packs its weight at the first pass in evaluation mode, and the
    product with a packed weight has no gradient: after an evaluation the layers below would silently stop learning.

    Args:
        model: A model that is to be trained; others than 4-bit on the CPU are left alone.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:
        return
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and module.support_avx512bf16_for_cpu:
            module.support_avx512bf16_for_cpu = False
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                module.state_dict()  # saving unpacks in place


def plain_layers(model: nn.Module, method: str) -> dict[str, LoraLayer]:
    """Return the LoRA layers of the active adapter, if all of them compute B(A x) by calling A and B.

    Args:
        model: A PEFT model with a LoRA adapter.
        method: The method's name, for the message.

    Returns:
        The layers by their names in the model.

    Raises:
        InputError: For DoRA and other variants, adapted embeddings and adapted bare parameters, and if an adapter has
            no layer.
    """
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


def check_training(args: TrainingArguments, optimizer: Any, method: str) -> None:
    """Refuse ways of training in which the steps of a method cannot be taken.

    Args:
        args: The Trainer's arguments.
        optimizer: The Trainer's optimiser.
        method: The method's name, for the message.

    Raises:
        InputError: For DeepSpeed, which steps inside ``backward``, FSDP1, which flattens parameters, and FSDP2 and
            tensor parallelism, which spread each over the processes.
    """
    if args.deepspeed or "DeepSpeed" in type(optimizer).__name__:
        raise InputError(
            f"{method} cannot train under DeepSpeed, which takes the optimiser's step inside backward; use DDP "
            "(accelerate launch)"
        )
    kinds = {base.__name__ for group in optimizer.param_groups for p in group["params"] for base in type(p).__mro__}
    if "FlatParameter" in kinds:
        raise InputError(
            f"{method} cannot train under FSDP version 1, which flattens the adapter's matrices; use DDP "
            "(accelerate launch)"
        )
    if "DTensor" in kinds:
        raise InputError(
            f"{method} cannot train under FSDP version 2 or tensor parallelism, where each process has a part of the "
            "adapter's matrices (DTensor) and would draw other noise; use DDP (accelerate launch)"
        )


def shadowed(
    model: nn.Module, params: Iterable[Tensor], value: Callable[[Tensor], Tensor | None]
) -> Callable[[], None]:
    """Let modules read other values in the place of their parameters while they train; the parameters stay as they are.

    A module's attribute is covered for the length of its own forward call, so gradients go to the parameter, gradient
    checkpointing reads the same value again, and whoever looks at the model from outside sees the parameter.

    Args:
        model: The model.
        params: Its parameters that are to be covered.
        value: Gives what to read in the place of a parameter, a function of it; None for the parameter itself. It is
            asked in training mode only.

    Returns:
        What to call to undo it.

    Raises:
        InputError: If a parameter is read by another module than its owner.
    """
    wanted, handles = set(params), []
    for path, module in model.named_modules():
        names = [name for name, p in module._parameters.items() if p is not None and p in wanted]
        if not names:
            continue
        if isinstance(module, nn.ParameterDict | nn.ParameterList):
            raise InputError(f"noise cannot be added to {path}, which is not a module with a forward pass of its own")

        def _cover(owner: nn.Module, inputs: Any, names: list[str] = names) -> None:
            if owner.training:
                for name in names:
                    other = value(owner._parameters[name])  # type: ignore[arg-type]
                    if other is not None:
                        owner.__dict__[name] = other

        def _uncover(owner: nn.Module, inputs: Any, output: Any, names: list[str] = names) -> None:
            for name in names:
                owner.__dict__.pop(name, None)

        handles += [
            module.register_forward_pre_hook(_cover),
            module.register_forward_hook(_uncover, always_call=True),
        ]

    def _undo() -> None:
        for handle in handles:
            handle.remove()

    return _undo
