"""The layer of BLoB: a LoRA matrix A with a Gaussian over it, and how it gets into a model and out again."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, final

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.methods.guards import plain_layers
from bayeslora.params import generator, live, require_lora

_SPREAD = "blob_spread"
"""Where the PEFT model holds every G: outside the LoRA layers, so that PEFT does not save it with the adapter."""


@final
class BlobLinear(nn.Linear):
    """A LoRA matrix A with a Gaussian over it; the mean is ``weight``, as in the layer that it takes the place of.

    Noise is added in training mode, while ``noisy`` is set. It comes from the global generator, which is what gradient
    checkpointing replays. G belongs to the PEFT model, not to the adapter.

    Args:
        plain: The layer whose weight is the mean M, [R I]; the parameter itself is taken over.
        spread: G, [R I]; the deviation Ω is its square.
    """

    def __init__(self, plain: nn.Linear, spread: nn.Parameter) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight = plain.weight
        self.training = plain.training
        self.noisy = False
        self._spread = (spread,)  # in a tuple, so that it is not registered a second time

    @property
    def spread(self) -> nn.Parameter:
        """G, [R I]."""
        return self._spread[0]

    def forward(self, input: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch R"]:
        """Return M x, and flipout's noise in training."""
        mean = functional.linear(input, self.weight)
        if not (self.noisy and self.training):
            return mean
        noise = self.spread.square()
        noise = (noise * torch.randn_like(noise)).to(self.weight.dtype)
        return mean + _flipped(functional.linear(_flipped(input), noise))


class _Flip(torch.autograd.Function):
    """x ⊙ s for s ∈ {±1}, of which one byte an element is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, signs: Tensor) -> Tensor:
        """Return x ⊙ s."""
        ctx.save_for_backward(signs)
        return x * signs.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x; the signs have none."""
        (signs,) = ctx.saved_tensors
        return grad * signs.to(grad.dtype), None


def _flipped(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return x with random signs, eight of them from each 64-bit random number."""
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    signs = (words.view(torch.int8)[: x.numel()].view(x.shape) & 2) - 1
    flipped: Tensor = _Flip.apply(x, signs)  # type: ignore[no-untyped-call]
    return flipped


def attach(model: nn.Module, init_spread: float, seed: int = 0) -> dict[str, BlobLinear]:
    """Put a `BlobLinear` in the place of every A of the active adapter.

    Args:
        model: A PEFT model with a LoRA adapter; layers that were put in earlier are replaced.
        init_spread: ε; G starts uniform on [ε/√2, ε].
        seed: Which start.

    Returns:
        The layers, by the names that A has on disk.

    Raises:
        InputError: If the adapter is not plain LoRA on linear layers.
    """
    adapter = require_lora(model).active_adapter
    layers = plain_layers(model, "BLoB")
    for path, layer in layers.items():
        if not isinstance(layer.lora_A[adapter], nn.Linear):
            raise InputError(f"BLoB serves linear layers, and {path} is a convolution; leave it out of target_modules")
    detach(model)
    found = {}
    names = {id(p): name for name, p in live(model).items()}
    for layer in layers.values():
        plain = layer.lora_A[adapter]
        name = names[id(plain.weight)]
        spread = nn.Parameter(torch.empty_like(plain.weight, dtype=torch.float32))
        layer.lora_A[adapter] = found[name] = BlobLinear(plain, spread)
    model.add_module(_SPREAD, nn.ParameterList([layer.spread for layer in found.values()]))
    if not any(layer.spread.is_meta for layer in found.values()):
        begin(found, init_spread, seed)
    return found


@torch.no_grad()
def begin(layers: dict[str, BlobLinear], init_spread: float, seed: int) -> None:
    """Draw the start of G, uniform on [ε/√2, ε].

    Args:
        layers: The layers by name.
        init_spread: ε.
        seed: Which start.
    """
    low = init_spread / math.sqrt(2)
    for name, layer in layers.items():
        uniform = torch.rand(layer.spread.shape, generator=generator("blob", seed, name))
        layer.spread.copy_(low + (init_spread - low) * uniform)


def detach(model: nn.Module, layers: Collection[BlobLinear] | None = None) -> None:
    """Put plain linear layers back in the place of `BlobLinear`; their weights are the means.

    Args:
        model: A PEFT model.
        layers: Which; None for all.
    """
    gone = []
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
        for adapter, inner in layer.lora_A.items():
            if isinstance(inner, BlobLinear) and (layers is None or any(inner is one for one in layers)):
                plain = nn.Linear(inner.in_features, inner.out_features, bias=False, device="meta")
                plain.weight, plain.training = inner.weight, inner.training
                layer.lora_A[adapter] = plain
                gone.append(inner)
    if gone:
        delattr(model, _SPREAD)
