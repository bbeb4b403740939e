"""Several draws in one pass over the frozen base: every adapted layer holds the draws' matrices side by side.

PEFT's LoRA layers call ``lora_B(lora_A(x))``, whatever the base is (plain, 8 or 4 bits), so only those two inner layers
change. Whether a model may be treated like this is tried on the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.params import Params, generator, holding, lora_parameters, read, require_lora, swapped
from bayeslora.prediction.fused import StackedLinear, fused, in_base_dtype
from bayeslora.prediction.probes import tried

_CLOSE = 0.1
"""Largest difference from the plain pass, by the difference of two draws, that is taken for rounding."""


@final
class Stack:
    """The layers of a model that answers for S draws at once, and the plain ones in whose places they are."""

    def __init__(self, draws: int) -> None:
        self.draws = draws
        self.replaced: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []  # parent, name there, plain, stacked

    @contextmanager
    def single(self) -> Iterator[None]:
        """Make the model answer with one set of weights, the first, for the length of a ``with`` block."""
        draws, self.draws = self.draws, 1
        for parent, key, plain, _ in self.replaced:
            setattr(parent, key, plain)
        try:
            yield
        finally:
            self.draws = draws
            for parent, key, _, layer in self.replaced:
                setattr(parent, key, layer)


@contextmanager
def stacked(
    model: nn.Module,
    draws: Sequence[Params],
    *,
    single: Params | None = None,
    share: bool = False,
    repeat: bool = True,
    peft: bool = False,
) -> Iterator[Stack]:
    """Make a model for which `stacks` is true answer for S draws at once for the length of a ``with`` block."""
    # Its inputs are repeated for the draws, draw after draw: at once, or, where draws ``share`` the layers before the
    # first that differs, from there on. Without ``repeat`` the rows that are given belong to the draws already. The
    # layers are `fused` and the draws in the base's dtype, or all is as in PEFT's own layers (``peft``). ``single`` are
    # the weights of `Stack.single`; None for the first draw.
    first = draws[0] if single is None else single
    names, parameters = differing([first, *draws]), lora_parameters(model)
    stack = Stack(len(draws))
    with holding(parameters, first):
        places, layers = _places(model, parameters, names), layers_that_differ(model, names) if share else ()
        assert places is not None
        repeating = (layers or (require_lora(model).get_base_model(),)) if repeat and len(draws) > 1 else ()
        dtype, layers_of = (nullcontext(), nullcontext()) if peft else (in_base_dtype(model), fused(model))
        with dtype, layers_of, _replaced(places, draws, names, stack), _repeated(repeating, stack):
            yield stack


@contextmanager
def side_by_side(model: nn.Module, starts: Sequence[Params]) -> Iterator[None]:
    """Give the model M adapters to be trained at once, from these starts, for the length of a ``with`` block."""
    # Parameters keep their names, and their first axis is the adapter's number; so do the rows of a batch, in order.
    places = _places(model, lora_parameters(model), frozenset(starts[0]))
    if places is None:
        raise InputError(
            "this adapter has parameters outside of linear layers, so its ensemble's members cannot be trained in one "
            "pass; use together=False"
        )
    with _replaced(places, starts, frozenset(starts[0]), Stack(len(starts)), trained=True):
        yield


@contextmanager
def _replaced(
    places: Sequence[Place], draws: Sequence[Params], names: frozenset[str], stack: Stack, *, trained: bool = False
) -> Iterator[None]:
    """Put stacked layers in some places for the length of a ``with`` block; what is not among names is not copied."""
    try:
        for parent, key, leaves in places:
            plain = getattr(parent, key)
            values = {}
            for leaf, name in leaves.items():
                value = getattr(plain, leaf)
                if name in names:
                    every = torch.stack([draw[name] for draw in draws]).to(value.data)
                    values[leaf] = nn.Parameter(every, value.requires_grad) if trained else every
                else:
                    values[leaf] = value.detach().expand(len(draws), *value.shape)
            layer = StackedLinear(values["weight"], values.get("bias"))
            layer.training = plain.training
            stack.replaced.append((parent, key, plain, layer))
            setattr(parent, key, layer)
        yield
    finally:
        for parent, key, plain, _ in stack.replaced:
            setattr(parent, key, plain)


def differing(draws: Sequence[Params]) -> frozenset[str]:
    """Return the names of the parameters that are not the same in all draws."""
    first = draws[0]
    return frozenset(
        name
        for name, value in first.items()
        if any(draw[name] is not value and not torch.equal(draw[name], value) for draw in draws[1:])
    )


def layers_that_differ(model: nn.Module, names: frozenset[str]) -> Sequence[nn.Module]:
    """Return the model's layers from the first with one of the parameters on; none if that is its first layer."""
    peft = require_lora(model)
    wanted = {id(p) for name, p in lora_parameters(peft).items() if name in names}
    for module in peft.modules():  # the outermost list comes first
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            numbers = [i for i, layer in enumerate(module) if any(id(p) in wanted for p in layer.parameters())]
            if numbers:
                return list(module)[numbers[0] :] if numbers[0] else ()
    return ()


def stacks(
    model: nn.Module,
    names: frozenset[str],
    answers: Callable[[int], Float[Tensor, "S B C"]],
    key: Hashable,
    *,
    share: bool = False,
    needed: bool = False,
) -> bool:
    """Try two random draws, stacked, against two plain passes, by the ``answers`` of S draws to a few rows."""
    trial = partial(_answer_alike, model, names, answers, share)
    return tried(model, ("stacked", names, key, share), trial, needed=needed)


def _answer_alike(model: nn.Module, names: frozenset[str], answers: Callable[[int], Tensor], share: bool) -> bool:
    """Compare two stacked draws, large enough to tell apart, with two plain passes."""
    if _places(model, lora_parameters(model), names) is None or (share and not layers_that_differ(model, names)):
        return False
    mean = read(model)
    draws = [
        {
            name: torch.randn(value.shape, generator=generator("stacked", k, name)) / math.sqrt(value.shape[-1])
            if name in names
            else value
            for name, value in mean.items()
        }
        for k in range(2)
    ]
    plain = []
    for draw in draws:
        with swapped(model, draw):
            plain.append(answers(1)[0])
    with stacked(model, draws, share=share):
        together = answers(2)
    wanted = torch.stack(plain)
    finite = torch.isfinite(wanted)
    apart = (wanted[0] - wanted[1])[finite[0]].abs().max()
    return together.shape == wanted.shape and bool((together - wanted)[finite].abs().max() <= _CLOSE * apart)


Place = tuple[nn.Module, str, dict[str, str]]
"""A linear layer: its parent, its name there, and the names of its weight and bias in the adapter."""


def _places(model: nn.Module, parameters: Mapping[str, Tensor], names: frozenset[str]) -> list[Place] | None:
    """Return the linear layers that hold some parameters; None if one belongs to anything else."""
    places: list[Place] = []
    left = set(names)
    if not left:
        return places
    known = {id(p): name for name, p in parameters.items()}
    for parent in model.modules():
        for key, child in parent.named_children():
            if type(child) is not nn.Linear:
                continue
            mine = {leaf: known[id(p)] for leaf, p in child.named_parameters(recurse=False) if id(p) in known}
            if left.intersection(mine.values()):
                leaves = {leaf: mine.get(leaf, "") for leaf, _ in child.named_parameters(recurse=False)}
                places.append((parent, key, leaves))
                left.difference_update(mine.values())
    return None if left else places


@contextmanager
def _repeated(modules: Sequence[nn.Module], stack: Stack) -> Iterator[None]:
    """Repeat the batch for each draw in all that some modules are given, the first of which runs first in a pass."""
    size = 0
    copies: dict[int, tuple[Tensor, Tensor]] = {}  # what is repeated already, by the tensor's id: layers share a mask

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Repeat whatever has the batch as its first axis."""
        nonlocal size
        if stack.draws == 1:
            return args, kwargs
        if module is modules[0]:
            rows = (*args, *(kwargs.get(name) for name in ("input_ids", "inputs_embeds", "hidden_states")))
            size = next(len(value) for value in rows if value is not None)
            copies.clear()
        return _with_copies(args, size, stack.draws, copies), _with_copies(kwargs, size, stack.draws, copies)

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
        yield


def _with_copies(value: Any, size: int, count: int, copies: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """Return what a module is given with each tensor of the batch's ``size`` rows, and two axes or more, repeated."""
    if isinstance(value, tuple | list):
        return type(value)(_with_copies(v, size, count, copies) for v in value)
    if isinstance(value, dict):
        return {k: _with_copies(v, size, count, copies) for k, v in value.items()}
    if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != size:
        return value
    if id(value) not in copies:  # the value is held as well, so that its id is not given to another
        copies[id(value)] = (value, value.repeat(count, *[1] * (value.ndim - 1)))
    return copies[id(value)][1]
