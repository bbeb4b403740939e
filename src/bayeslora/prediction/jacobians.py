"""Derivatives of the choices' logits by the adapter's parameters; no Jacobian of the whole adapter is ever held.

For a linear layer the gradient of an output by the weight is a sum over tokens of products g xᵀ of the gradient at the
layer's output and the layer's input. All that Laplace and linearised prediction need is made of these two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from bayeslora._typing import Float, Int
from bayeslora.errors import InputError
from bayeslora.params import evaluating, lora_parameters, require_lora


@final
@dataclass(frozen=True)
class Site:
    """A parameter of a linear layer: its weight, or its bias."""

    name: str  # on disk
    module: nn.Module
    bias: bool


def linear_sites(model: nn.Module, names: Callable[[str], bool] = lambda name: True) -> list[Site]:
    """Return a site for each wanted parameter of the active adapter, in the adapter's order."""
    peft = require_lora(model)
    wrappers = [m for m in peft.modules() if type(m).__name__ == "ParamWrapper"]  # adapts a parameter, calls no layer
    uncalled = {m for wrapper in wrappers for side in (wrapper.lora_A, wrapper.lora_B) for m in side.values()}
    owners = {
        p: (module, leaf == "bias")
        for module in peft.modules()
        if isinstance(module, nn.Linear) and module not in uncalled
        for leaf, p in module.named_parameters(recurse=False)
    }
    sites = []
    for name, p in lora_parameters(model).items():
        if not names(name):
            continue
        if p not in owners:  # DoRA's magnitudes, adapted embeddings and bare parameters
            raise InputError(
                f"{name} is not a weight of a linear layer that is called, and only those can be linearised; use plain "
                "LoRA on linear layers, or swag or an ensemble, which serve every kind"
            )
        sites.append(Site(name, *owners[p]))
    return sites


@final
@dataclass(frozen=True)
class Gradients:
    """For each layer, what the derivatives of one batch along K directions are made of, in float32."""

    examples: int  # N
    inputs: dict[nn.Module, Float[Tensor, "R T I"]]  # R sequences, or positions with T = 1
    outputs: dict[nn.Module, Float[Tensor, "K R T O"]]  # gradient along each direction at the layer's output
    owners: dict[nn.Module, Int[Tensor, " R"]]  # the example that each of the R belongs to

    def jacobian(self, site: Site) -> Float[Tensor, "K N O I"]:
        """Return the derivative of each example along the directions by one parameter; a bias has one column."""
        x, g, owner = self.inputs[site.module], self.outputs[site.module], self.owners[site.module]
        rows = g.sum(2)[..., None] if site.bias else torch.einsum("crto,rti->croi", g, x)
        total = rows.new_zeros(rows.shape[0], self.examples, *rows.shape[2:])
        return total.index_add_(1, owner.to(rows.device), rows)


@final
@dataclass(frozen=True)
class Pass:
    """One batch's forward pass, whose logits can be differentiated while it is held."""

    logits: Float[Tensor, "N C"]  # float32
    differentiate: Callable[[Tensor], Gradients]

    def along(self, directions: Float[Tensor, "N C K"] | None = None) -> Gradients:
        """Return the gradients along K sums over the classes, or each class by itself, by K backward passes."""
        return self.differentiate(each_class(self.logits) if directions is None else directions)


@contextmanager
def differentiated(model: nn.Module, sites: Sequence[Site]) -> Iterator[Callable[[dict[str, Tensor]], Pass]]:
    """Yield a function that runs a batch, with a readout attached, so that its logits have derivatives at the sites."""
    modules = list(dict.fromkeys(site.module for site in sites))
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def _note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if module in seen:
            raise InputError("a layer of the adapter is called twice in a pass, and cannot be linearised")
        seen[module] = (args[0].detach(), output)

    def _pass(batch: dict[str, Tensor]) -> Pass:
        seen.clear()
        with torch.inference_mode(False), torch.enable_grad():
            tensors = {key: value.clone() for key, value in batch.items()}  # inference mode's cannot be saved
            logits = require_lora(model)(**tensors).logits.float()
        if idle := [site.name for site in sites if site.module not in seen]:
            raise InputError(f"{idle[0]} took no part in a pass, and cannot be linearised; adapt other layers")
        layers = dict(seen)
        seen.clear()
        examples = _owners(batch, *logits.shape)

        def _gradients(directions: Tensor) -> Gradients:
            ends = [layers[m][1] for m in modules]
            with torch.inference_mode(False), torch.enable_grad():
                columns = [column.clone() for column in directions.to(logits).unbind(2)]
                rows = [
                    torch.autograd.grad(logits, ends, column, retain_graph=True, materialize_grads=True)
                    for column in columns
                ]
            inputs, outputs, owners = {}, {}, {}
            for module, *gradients in zip(modules, *rows, strict=True):
                x, g = layers[module][0].float(), torch.stack(gradients).float()
                inputs[module], outputs[module], owners[module] = _by_example(x, g, batch, examples)
            return Gradients(len(logits), inputs, outputs, owners)

        return Pass(logits.detach(), _gradients)

    with evaluating(model), ExitStack() as undo:
        for module in modules:
            undo.enter_context(module.register_forward_hook(_note))
        for p in lora_parameters(model).values():
            undo.callback(p.requires_grad_, p.requires_grad)
            p.requires_grad_(True)
        yield _pass


def each_class(logits: Float[Tensor, "N C"]) -> Float[Tensor, "N C C"]:
    """Return the directions of the classes themselves."""
    return torch.eye(logits.shape[1], device=logits.device).expand(len(logits), -1, -1)


def _owners(
    batch: dict[str, Tensor], examples: int, classes: int
) -> tuple[Int[Tensor, " sequences"], Int[Tensor, " kept"] | None]:
    """Return the example of each sequence of a batch, and of each position that the head sees, if it sees a few."""
    keep, sequences = batch.get("readout_keep"), batch["input_ids"]
    if keep is None:
        return torch.arange(examples, device=sequences.device), None
    row, example = batch["readout_row"], batch["readout_slot"] // classes
    of_sequence = keep.new_zeros(len(sequences)).index_put_((keep[row] // sequences.shape[1],), example)
    return of_sequence, torch.zeros_like(keep).index_put_((row,), example)


def _by_example(
    x: Tensor, g: Tensor, batch: dict[str, Tensor], owners: tuple[Tensor, Tensor | None]
) -> tuple[Float[Tensor, "R T I"], Float[Tensor, "K R T O"], Int[Tensor, " R"]]:
    """Return a layer's inputs and gradients with a token axis, and the example of each row; see `_owners`."""
    sequences, length = batch["input_ids"].shape
    of_sequence = owners[0]
    if x.ndim == 3 and len(x) == sequences:
        return x, g, of_sequence
    for owner in owners[::-1]:  # of kept positions first
        if x.ndim == 2 and owner is not None and len(x) == len(owner):
            return x[:, None], g[:, :, None], owner
    if x.ndim == 2 and len(x) == sequences * length:
        return x.view(sequences, length, -1), g.view(len(g), sequences, length, -1), of_sequence
    raise InputError(f"a layer's input of shape {tuple(x.shape)} cannot be told apart by examples")
