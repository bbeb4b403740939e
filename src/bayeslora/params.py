"""Adapter parameters: read, write, swap and re-initialise them, under the names they have on disk."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel, PeftType
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn

from bayeslora.errors import InputError

Params = dict[str, Tensor]
"""Adapter parameters by the names they have in ``adapter_model.safetensors``."""


def seed_of(*key: object) -> int:
    """Return the seed that a key stands for, the same on every machine and in every process.

    Args:
        *key: Anything whose ``str`` identifies the stream: a seed, a draw's index, a parameter's name.

    Returns:
        A seed; two different keys give independent streams.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: object) -> torch.Generator:
    """Return a fresh CPU generator, seeded by a key.

    Args:
        *key: See `seed_of`.

    Returns:
        The generator.
    """
    return torch.Generator("cpu").manual_seed(seed_of(*key))


def require_lora(model: nn.Module) -> PeftModel:
    """Return the model as a `PeftModel` whose active adapter is LoRA.

    Args:
        model: The model that the user gave.

    Returns:
        The same object.

    Raises:
        InputError: If it is not a PEFT model, or its active adapter is of another type.
    """
    if not isinstance(model, PeftModel):
        raise InputError(
            f"the model is a {type(model).__name__} without an adapter; wrap it with peft.get_peft_model(model, "
            "LoraConfig(...)) first"
        )
    kind = model.active_peft_config.peft_type
    if kind != PeftType.LORA:
        raise InputError(f"the active adapter is of type {kind.value}; bayeslora serves LoRA adapters only")
    return model


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the active adapter's parameters themselves, by the names they have on disk.

    LoRA matrices, DoRA magnitudes and whole modules that PEFT saves with the adapter (a classification head) are all
    there.

    Args:
        model: A PEFT model with a LoRA adapter.

    Returns:
        Name to the parameter object of the model; writing to it changes the model.

    Raises:
        InputError: If the model has no LoRA adapter, or the adapter has no parameter.
    """
    peft = require_lora(model)
    named = dict(peft.named_parameters(remove_duplicate=False)) | dict(peft.named_buffers())
    found: dict[str, nn.Parameter] = get_peft_model_state_dict(
        peft, state_dict=named, adapter_name=peft.active_adapter, save_embedding_layers=False
    )
    if not found:
        raise InputError(f"the adapter {peft.active_adapter!r} has no parameter; check its target_modules")
    return found


def device_of(model: nn.Module) -> torch.device:
    """Return where the active adapter is.

    Args:
        model: A PEFT model with a LoRA adapter.

    Returns:
        The device of its first parameter.
    """
    peft = require_lora(model)
    return next((p for name, p in peft.named_parameters() if ".lora_" in name), next(peft.parameters())).device


def read(model: nn.Module) -> Params:
    """Return a copy of the active adapter's parameters.

    Args:
        model: A PEFT model with a LoRA adapter.

    Returns:
        Float32 copies on the CPU.
    """
    return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in lora_parameters(model).items()}


def check_against(params: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse parameters that do not fit a model's active adapter.

    Args:
        params: Parameters that are to be written.
        own: The adapter's own, as `lora_parameters` gives them.

    Raises:
        InputError: If a name is missing or left over, or a shape differs; the message names the first one.
    """
    for name in own.keys() - params.keys():
        raise InputError(
            f"the posterior has no tensor {name!r}, which the model's adapter has; use the LoraConfig "
            "with which it was trained"
        )
    for name, value in params.items():
        if name not in own:
            raise InputError(
                f"the model's adapter has no parameter {name!r}, which the posterior has; use the "
                "LoraConfig with which it was trained"
            )
        if value.shape != own[name].shape:
            raise InputError(
                f"the posterior's {name!r} has shape {tuple(value.shape)}, the model's adapter "
                f"{tuple(own[name].shape)}; use the LoraConfig with which it was trained"
            )


@torch.no_grad()
def write(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Write parameters into the active adapter.

    Args:
        model: A PEFT model with a LoRA adapter.
        params: Values for every parameter of the adapter; they are cast to the adapter's dtype and device.
    """
    own = lora_parameters(model)
    check_against(params, own)
    for name, parameter in own.items():
        parameter.copy_(params[name])


@contextmanager
def swapped(model: nn.Module, params: Mapping[str, Tensor]) -> Iterator[None]:
    """Put parameters into the adapter for the length of a ``with`` block.

    Args:
        model: A PEFT model with a LoRA adapter.
        params: Values for every parameter of the adapter.

    Yields:
        Nothing. Afterwards, and on any exception, the adapter is bit for bit what it was.
    """
    with holding(lora_parameters(model), params):
        yield


@contextmanager
def holding(own: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> Iterator[None]:
    """Put values into an adapter's own parameters for the length of a ``with`` block.

    Args:
        own: The adapter's own, as `lora_parameters` gives them.
        params: Values for all of them.

    Yields:
        Nothing. Afterwards, and on any exception, they are bit for bit what they were.
    """
    check_against(params, own)
    before = {name: p.detach().clone() for name, p in own.items()}

    @torch.no_grad()
    def put(values: Mapping[str, Tensor]) -> None:
        """Write values into the adapter."""
        for name, parameter in own.items():
            parameter.copy_(values[name])

    try:
        put(params)
        yield
    finally:
        put(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for the length of a ``with`` block.

    Args:
        model: Any model.

    Yields:
        Nothing. Afterwards, and on any exception, each module is in the mode that it was in.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Give the active adapter a fresh start: A (and a new classification head) drawn anew, B zero.

    The distributions are those of PEFT (A uniform on ±1/√in, or normal with deviation 1/r for
    ``init_lora_weights="gaussian"``) and of the model (head weights normal with ``initializer_range``); the numbers
    depend on the seed and the parameter's name only.

    Args:
        model: A PEFT model with a LoRA adapter.
        seed: Which start.

    Raises:
        InputError: If the adapter starts from the base weights (PiSSA, OLoRA, LoftQ, …) or is DoRA, so that a second
            start cannot be drawn.
    """
    peft = require_lora(model)
    config = peft.active_peft_config
    init = config.init_lora_weights
    if config.use_dora or config.bias != "none" or init not in (True, "gaussian"):
        what = "DoRA" if config.use_dora else f"init_lora_weights={init!r}, bias={config.bias!r}"
        raise InputError(
            f"a fresh start cannot be drawn for {what}; use plain LoRA with init_lora_weights=True and bias='none'"
        )
    spread = getattr(getattr(peft, "config", None), "initializer_range", 0.02)
    for name, p in lora_parameters(peft).items():
        rng = generator("init", seed, name)
        if "lora_embedding_B" in name or ("lora_A" in name and init == "gaussian"):
            p.copy_(torch.randn(p.shape, generator=rng) * (1 / config.r if "lora_A" in name else 1.0))
        elif "lora_A" in name:
            fan_in = math.prod(p.shape[1:])
            p.copy_((torch.rand(p.shape, generator=rng) * 2 - 1) / math.sqrt(fan_in))
        elif "lora_" in name:
            p.zero_()
        elif not _restore_pretrained(peft, name, p):
            p.copy_(torch.randn(p.shape, generator=rng) * spread) if p.ndim > 1 else p.zero_()


def _restore_pretrained(model: PeftModel, name: str, parameter: nn.Parameter) -> bool:
    """Give a module saved whole its pre-trained weights back, unless it is a head that was new to begin with."""
    if str(getattr(model.active_peft_config, "task_type", "")).endswith(("SEQ_CLS", "TOKEN_CLS")) and any(
        part in ("classifier", "score") for part in name.split(".")
    ):
        return False
    owner, _, leaf = name.rpartition(".")
    for path, module in model.named_modules():
        original = getattr(module, "original_module", None)
        if original is not None and (owner == path or owner.startswith(path + ".")):
            inner = f"{owner.removeprefix(path).lstrip('.')}.{leaf}".lstrip(".")
            parameter.copy_(original.get_parameter(inner))
            return True
    return False
