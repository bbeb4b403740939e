"""The layer of BLoB: a LoRA matrix A with a Gaussian over it, and how it gets into a model and out again."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, final

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.methods.guards import plain_layers
from bayeslora.params import generator, lora_parameters, require_lora, spread_as, whole

_SPREAD = "blob_spread"
"""Where the PEFT model holds every G: outside the LoRA layers, so that PEFT does not save it with the adapter."""

_HIGH = (5 * (1 - math.sqrt(0.5)) / (1 - 0.5**2.5)) ** 0.25
"""ε for which G⁴ has the mean 1 if G is uniform on [ε/√2, ε]."""


@final
class BlobLinear(nn.Linear):
    """A LoRA matrix A with a Gaussian over it: ``weight`` is the mean M, [R I], and G², [R I], the deviation Ω.

    Noise is added in training mode, while ``noisy`` is set. It comes from the global generator, which is what gradient
    checkpointing replays. G belongs to the PEFT model, not to the adapter.
    """

    def __init__(self, plain: nn.Linear, spreads: nn.ParameterList, number: int) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight = plain.weight
        self.training = plain.training
        self.noisy = False
        self._spread = (spreads, number)  # in a tuple, so that it is not registered a second time

    @property
    def spread(self) -> nn.Parameter:
        """G, [R I]; FSDP puts others in its place."""
        spreads, number = self._spread
        return spreads[number]

    def forward(self, input: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch R"]:
        """Return M x, and flipout's noise in training."""
        if not (self.noisy and self.training):
            return functional.linear(input, self.weight)
        noise = self.spread.square()
        noise = (noise * torch.randn_like(noise)).to(self.weight.dtype)
        rows = input.reshape(-1, self.in_features)
        mean, place = self.weight, rows.device.type
        if torch.is_autocast_enabled(place):
            kind = torch.get_autocast_dtype(place)
            rows, mean, noise = rows.to(kind), mean.to(kind), noise.to(kind)
        with torch.autocast(place, enabled=False):
            output: Tensor = Flipout.apply(  # type: ignore[no-untyped-call]
                rows, mean, noise, sign_words(rows, self.in_features), sign_words(rows, self.out_features)
            )
        return output.view(*input.shape[:-1], self.out_features)


class Flipout(torch.autograd.Function):
    """M x + r ⊙ N (s ⊙ x) for N = Ω ⊙ ε and random signs r and s of each token (Wen et al. 2018, arXiv 1803.04386)."""

    # one function, so that the backward pass keeps x, which autograd would keep anyway, and one bit for each sign

    @staticmethod
    def forward(ctx: Any, rows: Tensor, mean: Tensor, noise: Tensor, into: Tensor, out: Tensor) -> Tensor:
        """Return the outputs, [T R], of the rows, [T I]; ``into`` and ``out`` hold the signs s and r."""
        ctx.save_for_backward(rows, mean, noise, into, out)
        return (rows @ mean.T).add_(_flipped(_flipped(rows, into) @ noise.T, out))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, M and N; the signs have none."""
        rows, mean, noise, into, out = ctx.saved_tensors
        needs_rows, needs_mean, needs_noise, *_ = ctx.needs_input_grad
        turned, signs = _flipped(grad, out), _sign_bits(into, len(rows))
        to_rows = to_noise = None
        if needs_rows:
            to_rows = turned @ noise
            to_rows.view(signs.dtype).bitwise_xor_(signs)
            to_rows.addmm_(grad, mean)
        if needs_noise:
            to_noise = turned.T @ signs.bitwise_xor_(rows.view(signs.dtype)).view(rows.dtype)
        return to_rows, grad.T @ rows if needs_mean else None, to_noise, None, None


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def sign_words(rows: Float[Tensor, "T I"], width: int) -> Tensor:
    """Return random words that hold a sign for each of T rows and a number of columns, [⌈T/bits⌉, width]."""
    kind = torch.iinfo(_INTEGERS[rows.element_size()])
    shape = (-(-len(rows) // kind.bits), width)
    high = min(kind.max + 1, 2**63 - 1)  # which is no word itself: of 2^64 words one is left out
    return torch.randint(kind.min, high, shape, dtype=_INTEGERS[rows.element_size()], device=rows.device)


def _sign_bits(words: Tensor, count: int) -> Tensor:
    """Return the words' signs in the place of a floating-point number's sign bit, [count, width]."""
    shifts = torch.arange(8 * words.element_size(), dtype=words.dtype, device=words.device)
    bits = (words[:, None] << shifts[:, None]).bitwise_and_(torch.iinfo(words.dtype).min)
    return bits.view(-1, words.shape[1])[:count]


def _flipped(rows: Float[Tensor, "T W"], words: Tensor) -> Float[Tensor, "T W"]:
    """Return the rows with the words' signs."""
    bits = _sign_bits(words, len(rows))
    return bits.bitwise_xor_(rows.view(bits.dtype)).view(rows.dtype)


def attach(model: nn.Module) -> dict[str, BlobLinear]:
    """Put a `BlobLinear` without spread (see `begin`) in the place of every active A; return them by A's names."""
    adapter = require_lora(model).active_adapter
    layers = plain_layers(model, "BLoB")
    for path, layer in layers.items():
        if not isinstance(layer.lora_A[adapter], nn.Linear):
            raise InputError(f"BLoB serves linear layers, and {path} is a convolution; leave it out of target_modules")
    detach(model)
    noisy, spreads = {}, nn.ParameterList()
    names = {id(p): name for name, p in lora_parameters(model).items()}
    for layer in layers.values():
        plain = layer.lora_A[adapter]
        name = names[id(plain.weight)]
        spreads.append(nn.Parameter(torch.zeros_like(plain.weight, dtype=torch.float32)))
        layer.lora_A[adapter] = noisy[name] = BlobLinear(plain, spreads, len(noisy))
    model.add_module(_SPREAD, spreads)
    return noisy


@torch.no_grad()
def sizes(layers: Mapping[str, BlobLinear]) -> dict[str, float]:
    """Return the root mean square of each M, or 1/√(3·in), as PEFT starts A, where a matrix is zero."""
    measured = {
        name: float(whole(layer.weight.detach()).float().square().mean().sqrt()) for name, layer in layers.items()
    }
    return {name: size or 1 / math.sqrt(3 * layers[name].in_features) for name, size in measured.items()}


@torch.no_grad()
def begin(layers: Mapping[str, BlobLinear], init_spread: float | None, relative: float, seed: int) -> None:
    """Draw G uniform on [ε/√2, ε]; ε is ``init_spread``, or such that Ω has ``relative`` times the size of M."""
    for name, size in sizes(layers).items():
        high = _HIGH * math.sqrt(relative * size) if init_spread is None else init_spread
        low, spread = high / math.sqrt(2), layers[name].spread
        uniform = torch.rand(spread.shape, generator=generator("blob", seed, name))
        spread.copy_(spread_as(low + (high - low) * uniform, spread))


def detach(model: nn.Module, layers: Collection[BlobLinear] | None = None) -> None:
    """Put plain linear layers, whose weights are the means, back in the place of these layers, or of all."""
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
