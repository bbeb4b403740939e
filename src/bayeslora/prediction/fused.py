"""LoRA layers that do what PEFT's do in fewer passes over the activations, for as long as a ``with`` block lasts.

PEFT returns ``base(x) + lora_B(lora_A(x)) * scaling``: three passes over the layer's output [*batch O] beside the
products, and three more backwards. Here the scaling goes to the R columns between A and B, and the product with B is
added to the base's output by the matrix product itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch
from peft.tuners import lora
from torch import Tensor, nn

from bayeslora._typing import Float
from bayeslora.models import fast_dtype
from bayeslora.params import device_of, require_lora

_HALF = (torch.bfloat16, torch.float16)
"""Dtypes that draws are rounded to, where the device multiplies them; see `in_base_dtype`."""


@final
class StackedLinear(nn.Module):
    """S linear layers side by side; the rows belong to them in S equal parts, in order, and parameters are trained."""

    def __init__(self, weight: Float[Tensor, "S O I"], bias: Float[Tensor, "S O"] | None) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Buffer(weight, persistent=False)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Buffer(bias, persistent=False)

    def forward(self, input: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """Return each part's rows through its own layer."""
        parts = input.reshape(len(self.weight), -1, input.shape[-1])
        across = self.weight.transpose(1, 2)
        out = torch.bmm(parts, across) if self.bias is None else torch.baddbmm(self.bias[:, None], parts, across)
        return out.view(*input.shape[:-1], out.shape[-1])


@final
class FusedLinear(lora.Linear):
    """PEFT's adapted linear layer with one plain adapter, in fewer passes; anything else goes PEFT's way."""

    def forward(self, x: Float[Tensor, "*batch I"], *args: object, **kwargs: object) -> Float[Tensor, "*batch O"]:
        """Return the base's output with the adapter's added."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or len(names) != 1 or self.disable_adapters or self.merged or names[0] in self.lora_variant:
            return super().forward(x, *args, **kwargs)
        (name,) = names
        a, b = self.lora_A[name], self.lora_B[name]
        if b.bias is not None:  # the scaling is of the bias too
            return super().forward(x)
        result: Tensor = self.base_layer(x)
        inner = a(self.lora_dropout[name](x.to(a.weight.dtype))) * self.scaling[name]
        if not (result.dtype == inner.dtype == b.weight.dtype) or b._forward_pre_hooks or b._forward_hooks:
            return (result + b(inner)).to(result.dtype)
        return added(result, inner, b.weight)


def added(
    result: Float[Tensor, "*batch O"], inner: Float[Tensor, "*batch R"], weight: Float[Tensor, "*draws O R"]
) -> Float[Tensor, "*batch O"]:
    """Return a layer's output with ``inner`` times B added, B stacked or not; in place if there are no gradients."""
    every = weight if weight.ndim == 3 else weight[None]
    outputs, columns = (t.reshape(len(every), -1, t.shape[-1]) for t in (result, inner))
    if weight.ndim == 2 and not torch.is_grad_enabled():
        outputs[0].addmm_(columns[0], weight.t())
    elif weight.ndim == 2:
        outputs = torch.addmm(outputs[0], columns[0], weight.t())
    elif not torch.is_grad_enabled():
        outputs.baddbmm_(columns, weight.transpose(1, 2))
    else:
        outputs = torch.baddbmm(outputs, columns, weight.transpose(1, 2))
    return outputs.view(result.shape)


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Run a model's plain linear LoRA layers fused for the length of a ``with`` block."""
    layers = [module for module in require_lora(model).modules() if type(module) is lora.Linear]
    try:
        for layer in layers:
            layer.__class__ = FusedLinear
        yield
    finally:
        for layer in layers:
            layer.__class__ = lora.Linear


@contextmanager
def in_base_dtype(model: nn.Module) -> Iterator[None]:
    """Round the adapter's A and B to the dtype of a half-precision base layer for the length of a ``with`` block.

    PEFT keeps them in float32, and casts the input and the output of every adapted layer. Where a CPU does not multiply
    that dtype in hardware they stay, for thin products in it take longer than the casts. The layers have other
    parameters inside the block, so what is written into the adapter there has no effect.
    """
    device = device_of(model)
    kinds = _HALF if device.type != "cpu" else tuple({fast_dtype(device)}.intersection(_HALF))
    held: list[tuple[nn.ModuleDict, str, nn.Module]] = []
    try:
        for layer in (m for m in require_lora(model).modules() if isinstance(m, lora.LoraLayer)):
            dtype = _dtype(layer, model)
            for parent in (layer.lora_A, layer.lora_B):
                for key, plain in parent.items():
                    if type(plain) is nn.Linear and dtype in kinds and plain.weight.dtype != dtype:
                        held.append((parent, key, plain))
                        parent[key] = _rounded(plain, dtype)
        yield
    finally:
        for parent, key, plain in held:
            parent[key] = plain


def _dtype(layer: lora.LoraLayer, model: nn.Module) -> torch.dtype:
    """Return the dtype of a base layer, of the model's activations where the layer's weight is packed."""
    weight = next((p for p in layer.get_base_layer().parameters(recurse=False)), None)
    dtype: torch.dtype = require_lora(model).get_base_model().dtype
    return weight.dtype if weight is not None and weight.is_floating_point() else dtype


def _rounded(plain: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """Return a layer with rounded parameters, and with the hooks of the original."""
    layer = copy.copy(plain)
    vars(layer)["_parameters"] = {
        key: nn.Parameter(p.detach().to(dtype), requires_grad=False) for key, p in plain.named_parameters(recurse=False)
    } | ({"bias": None} if plain.bias is None else {})
    return layer
