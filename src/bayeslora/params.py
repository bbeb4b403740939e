"""Adapter parameters: read, write, swap and re-initialise them, under the names they have on disk."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel, PeftType
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm

from bayeslora.errors import InputError

Params = dict[str, Tensor]
"""Adapter parameters by the names they have in ``adapter_model.safetensors``."""


def seed_of(*key: object) -> int:
    """Return the seed that a key stands for, the same on every machine; two different keys give independent streams."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: object) -> torch.Generator:
    """Return a fresh CPU generator, seeded by a key as in `seed_of`."""
    return torch.Generator("cpu").manual_seed(seed_of(*key))


def require_lora(model: nn.Module) -> PeftModel:
    """Return the model as a `PeftModel`, or refuse it if its active adapter is not LoRA."""
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
    """Return the active adapter's parameters themselves by their names on disk; writing to one changes the model."""
    peft = require_lora(model)
    # LoRA matrices, DoRA magnitudes, and modules that PEFT saves whole (a classification head)
    named = dict(peft.named_parameters(remove_duplicate=False)) | dict(peft.named_buffers())
    parameters: dict[str, nn.Parameter] = get_peft_model_state_dict(
        peft, state_dict=named, adapter_name=peft.active_adapter, save_embedding_layers=False
    )
    if not parameters:
        raise InputError(f"the adapter {peft.active_adapter!r} has no parameter; check its target_modules")
    return parameters


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the active adapter's first parameter."""
    peft = require_lora(model)
    return next((p for name, p in peft.named_parameters() if ".lora_" in name), next(peft.parameters())).device


def read(model: nn.Module) -> Params:
    """Return a float32 copy of the active adapter's parameters, on the CPU."""
    return {name: whole(p.detach()).to("cpu", torch.float32, copy=True) for name, p in lora_parameters(model).items()}


def is_spread(model: nn.Module) -> bool:
    """Return whether a model's weights are spread over processes, which then can only pass batches together."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that is spread over processes (FSDP 2), all of which must ask; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that is spread over processes, sharing its memory; others as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread_as(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, which all processes have, spread as another is, if it is; nothing is exchanged."""
    if isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def stack_across(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one shape, which may lie on several devices, stacked on the first one's."""
    return torch.stack([t.to(tensors[0].device) for t in tensors])


def largest(tensors: Iterable[Tensor]) -> Tensor:
    """Return max |x| of all tensors, of this process's part where they are spread; not finite if any number is not."""
    parts = [local(t) for t in tensors]
    return get_total_norm([t for t in parts if t.is_floating_point() and t.numel()], math.inf).float()


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that have a NaN or an infinity."""
    return [name for name, value in tensors.items() if not bool(largest([value]).isfinite())]


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors of which one has a NaN or an infinity, by its name; ``what`` is what the message begins with."""
    if not bool(largest(tensors.values()).isfinite()):
        names = non_finite(tensors)
        more = f", and {len(names) - 1} more tensors" if len(names) > 1 else ""
        raise InputError(
            f"{what}: {names[0]}{more} has numbers that are not finite; train with a lower learning rate, or from an "
            "earlier checkpoint"
        )


def check_against(params: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters that do not fit a model's `lora_parameters`, by the name of the first that does not."""
    for name in parameters.keys() - params.keys():
        raise InputError(
            f"the posterior has no tensor {name!r}, which the model's adapter has; use the LoraConfig "
            "with which it was trained"
        )
    for name, value in params.items():
        if name not in parameters:
            raise InputError(
                f"the model's adapter has no parameter {name!r}, which the posterior has; use the "
                "LoraConfig with which it was trained"
            )
        if value.shape != parameters[name].shape:
            raise InputError(
                f"the posterior's {name!r} has shape {tuple(value.shape)}, the model's adapter "
                f"{tuple(parameters[name].shape)}; use the LoraConfig with which it was trained"
            )


def write(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Write a value for every parameter of the active adapter, cast to its dtype and device."""
    parameters = lora_parameters(model)
    check_against(params, parameters)
    _copy(parameters, params)


@contextmanager
def swapped(model: nn.Module, params: Mapping[str, Tensor]) -> Iterator[None]:
    """Put values into the adapter inside the block; after it, or an exception, it is bit for bit as before."""
    with holding(lora_parameters(model), params):
        yield


@contextmanager
def holding(parameters: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> Iterator[None]:
    """Put values into `lora_parameters` inside the block; after it, or an exception, they are bit for bit as before."""
    check_against(params, parameters)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        _copy(parameters, params)
        yield
    finally:
        _copy(parameters, before)


@torch.no_grad()
def _copy(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into parameters of the same names, cast to their dtype and device."""
    for name, parameter in parameters.items():
        parameter.copy_(spread_as(values[name], parameter))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode inside the block; after it, or an exception, each module has its former mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Give the active adapter a fresh start, by the seed and names alone: A (and a new head) drawn anew, B zero."""
    # As PEFT draws it: A uniform on ±1/√in, or normal with deviation 1/r for init_lora_weights="gaussian"; as the model
    # draws it: head weights normal with initializer_range. A start from the base weights (PiSSA, OLoRA, LoftQ) or of
    # DoRA cannot be drawn a second time.
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
            start = torch.randn(p.shape, generator=rng) * (1 / config.r if "lora_A" in name else 1.0)
            p.copy_(spread_as(start, p))
        elif "lora_A" in name:
            fan_in = math.prod(p.shape[1:])
            p.copy_(spread_as((torch.rand(p.shape, generator=rng) * 2 - 1) / math.sqrt(fan_in), p))
        elif "lora_" in name:
            p.zero_()
        elif not _restore_pretrained(peft, name, p):
            p.copy_(spread_as(torch.randn(p.shape, generator=rng) * spread, p)) if p.ndim > 1 else p.zero_()


def is_new_head(model: PeftModel, name: str) -> bool:
    """Say whether a parameter is of a classification head, which has no pre-trained weights."""
    classifies = str(getattr(model.active_peft_config, "task_type", "")).endswith(("SEQ_CLS", "TOKEN_CLS"))
    return classifies and any(part in ("classifier", "score") for part in name.split("."))


def _restore_pretrained(model: PeftModel, name: str, parameter: nn.Parameter) -> bool:
    """Give a module saved whole its pre-trained weights back, unless it is a head that was new to begin with."""
    if is_new_head(model, name):
        return False
    owner, _, leaf = name.rpartition(".")
    for path, module in model.named_modules():
        original = getattr(module, "original_module", None)
        if original is not None and (owner == path or owner.startswith(path + ".")):
            inner = f"{owner.removeprefix(path).lstrip('.')}.{leaf}".lstrip(".")
            parameter.copy_(original.get_parameter(inner))
            return True
    return False
