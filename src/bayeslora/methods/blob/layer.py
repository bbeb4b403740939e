"""The layer of BLoB: a LoRA matrix A with a Gaussian over it, and how it gets into a model and out again."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, final

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from bayeslora._typing import Float, Int
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

    Noise is added in training mode, while ``noisy`` is set. Its key comes from the global generator of the CPU, which
    is what gradient checkpointing replays; E is a function of the key, and signs are of the key and of a token's place
    in the batch of all processes, of which this is number ``process``: so they add the noise that one would add. G
    belongs to the PEFT model, not to the adapter.
    """

    def __init__(self, plain: nn.Linear, spreads: nn.ParameterList, number: int) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight = plain.weight
        self.training = plain.training
        self.noisy = False
        self.process = 0
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
        key = torch.randint(2**62, (3,))
        spread = self.spread
        noise = (spread.square() * normal(key[0], spread)).to(self.weight.dtype)
        shape = input.shape[-2:] if input.ndim > 1 else (1, self.in_features)
        rows, mean, place = input.reshape(math.prod(input.shape[:-2]), *shape), self.weight, input.device.type
        if torch.is_autocast_enabled(place):
            kind = torch.get_autocast_dtype(place)
            rows, mean, noise = rows.to(kind), mean.to(kind), noise.to(kind)
        into = sign_words(key[1], rows, self.in_features, self.process)
        out = sign_words(key[2], rows, self.out_features, self.process)
        with torch.autocast(place, enabled=False):
            output: Tensor = Flipout.apply(rows, mean, noise, into, out)  # type: ignore[no-untyped-call]
        return output.view(*input.shape[:-1], self.out_features)


class Flipout(torch.autograd.Function):
    """M x + r ⊙ N (s ⊙ x) for N = Ω ⊙ ε and random signs r and s of each token (Wen et al. 2018, arXiv 1803.04386)."""

    # one function, so that the backward pass keeps x, which autograd would keep anyway, and one bit for each sign

    @staticmethod
    def forward(ctx: Any, rows: Tensor, mean: Tensor, noise: Tensor, into: Tensor, out: Tensor) -> Tensor:
        """Return the outputs, [B T R], of the rows, [B T I]; ``into`` and ``out`` hold the signs s and r."""
        ctx.save_for_backward(rows, mean, noise, into, out)
        return (rows @ mean.T).add_(_flipped(_flipped(rows, into) @ noise.T, out))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, M and N; the signs have none."""
        rows, mean, noise, into, out = ctx.saved_tensors
        needs_rows, needs_mean, needs_noise, *_ = ctx.needs_input_grad
        turned, signs, flat = _flipped(grad, out), _sign_bits(into, rows), grad.flatten(0, 1)
        to_rows = to_noise = None
        if needs_rows:
            to_rows = turned @ noise
            to_rows.view(signs.dtype).bitwise_xor_(signs)
            to_rows.flatten(0, 1).addmm_(flat, mean)
        if needs_noise:
            flipped = signs.bitwise_xor_(rows.view(signs.dtype)).view(rows.dtype)
            to_noise = turned.flatten(0, 1).T @ flipped.flatten(0, 1)
        return to_rows, flat.T @ rows.flatten(0, 1) if needs_mean else None, to_noise, None, None


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_WORDS = 2**32
"""More than there are words of signs for a sequence."""


def mixed(words: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """Return bits that look random: the last step of SplitMix64 (Steele, Lea and Flood 2014, figure 16)."""
    words = (words ^ ((words >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    words = (words ^ ((words >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return words ^ ((words >> 31) & (2**33 - 1))


def normal(key: Int[Tensor, ""], like: Float[Tensor, "R I"]) -> Float[Tensor, "R I"]:
    """Return standard normal numbers, a function of a key and of their place (Box and Muller 1958)."""
    words = mixed(key + torch.arange(like.numel(), device=like.device).view_as(like) * _GOLDEN)
    one, other = (((half & (2**32 - 1)).to(like.dtype) + 0.5) * 2**-32 for half in (words >> 32, words))
    return (-2 * one.log()).sqrt_().mul_((2 * math.pi * other).cos_())


def sign_words(
    key: Int[Tensor, ""], rows: Float[Tensor, "B T I"], width: int, process: int = 0
) -> Int[Tensor, "B words W"]:
    """Return random words that hold a sign for each token, by its place and its sequence's in all processes' batch."""
    kind, device = _INTEGERS[rows.element_size()], rows.device
    count, blocks = len(rows), -(-rows.shape[1] // (8 * rows.element_size()))
    words = torch.arange(blocks * width, device=device).view(blocks, width)
    sequences = torch.arange(process * count, (process + 1) * count, device=device)
    return mixed(key + (sequences[:, None, None] * _WORDS + words) * _GOLDEN).to(kind)


def _sign_bits(words: Int[Tensor, "B words W"], rows: Float[Tensor, "B T I"]) -> Int[Tensor, "B T W"]:
    """Return the words' signs of some tokens in the place of a floating-point number's sign bit."""
    shifts = torch.arange(8 * words.element_size(), dtype=words.dtype, device=words.device)
    bits = (words[:, :, None] << shifts[:, None]).bitwise_and_(torch.iinfo(words.dtype).min)
    return bits.flatten(1, 2)[:, : rows.shape[1]]


def _flipped(rows: Float[Tensor, "B T W"], words: Int[Tensor, "B words W"]) -> Float[Tensor, "B T W"]:
    """Return the rows with the words' signs."""
    bits = _sign_bits(words, rows)
    return bits.bitwise_xor_(rows.view(bits.dtype)).view(rows.dtype)


def attach(model: nn.Module) -> dict[str, BlobLinear]:
    """Put a `BlobLinear` without spread (see `begin`) in the place of every active A; return them by A's names."""
    adapter = require_lora(model).active_adapter
    layers = plain_layers(model, "BLoB")
    for path, layer in layers.items():
        if not isinstance(layer.lora_A[adapter], nn.Linear):
            raise InputError(f"BLoB serves linear layers, and {path} is a convolution; leave it out of target_modules")
    detach(model)
    noisy: dict[str, BlobLinear] = {}
    spreads = nn.ParameterList()
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
