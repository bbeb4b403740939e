"""GPUs that are pretended on a machine without one: tensors have values, and a place; what mixes places raises.

The tensors are ordinary ones whose memory carries the name of a place, ``cuda:0`` say, so that everything runs, trials
and training included. Where a function is given tensors of several places, or of one and the CPU, PyTorch's own fake
tensors say whether it may be, as on a real GPU; where they cannot, tensors of one number and indices may be on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import PropertyMock, patch

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import TrainingArguments

FIRST, SECOND = "cuda:0", "cuda:1"
_NAMES = {"cuda": FIRST, "cpu:0": "cpu"}
_CPU_INDICES = (Tensor.__getitem__, Tensor.__setitem__)
_MOVES = ("to", "cpu", "cuda", "type_as")
_ANYWHERE = ("backward", "__set__", "_has_compatible_shallow_copy_type")


def _memory(value: Tensor) -> Any:
    """Return the memory of a tensor, of a wrapped one too."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value.untyped_storage()


def place(value: Tensor) -> str:
    """Return where a tensor is."""
    return "meta" if value.is_meta else getattr(_memory(value), "_place", "cpu")


def put(value: Any, where: object) -> Any:
    """Say where a tensor's memory is; other values are returned as they are."""
    if isinstance(value, Tensor) and not value.is_meta:
        _memory(value)._place = _NAMES.get(str(where), str(where))
    return value


class OtherDeviceError(Exception):
    """A function was given tensors of several devices; no RuntimeError, which a trial would take for a no."""


class Pretended(TorchFunctionMode):
    """Tensors are where their memory says, and meet no others."""

    def __init__(self) -> None:
        super().__init__()
        self.judged = 0
        self._fakes = FakeTensorMode()

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function where its tensors are, or raise."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args)
        if func is torch.autograd.grad:
            found = func(*args, **kwargs)
            return tuple(put(value, place(asked)) for value, asked in zip(found, args[1], strict=True))
        if func is torch.autograd.backward or name in _ANYWHERE:
            return func(*args, **kwargs)
        if name in _MOVES and args and isinstance(args[0], Tensor):
            return self._to_device(name, args[0], args[1:], kwargs)
        if name == "numpy" and place(args[0]) != "cpu":
            raise OtherDeviceError("numpy is given a tensor that is not on the CPU")
        if name.startswith("_foreach_"):
            return self._each(func, args, kwargs)
        asked = kwargs.get("device")
        where = self._where(func, args, kwargs)
        if asked is not None and str(asked) != "meta":
            kwargs["device"] = "cpu"
        found = func(*args, **kwargs)
        return found if asked is not None and str(asked) == "meta" else tree_map(lambda v: put(v, where), found)

    def _each(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a function of lists of tensors, which may be anywhere if those that meet are at one place."""
        columns = zip(*(a for a in args if isinstance(a, (list, tuple)) and isinstance(a[0], Tensor)), strict=True)
        where = [self._by_rule(func, (), column) for column in columns]
        found = func(*args, **kwargs)
        for value, at in zip(found or (), where, strict=False):
            put(value, at)
        return found

    def _attribute(self, func: Any, args: Any) -> Any:
        """Return an attribute of a tensor."""
        owner = getattr(func, "__self__", None)
        if owner is Tensor.device:
            return torch.device(place(args[0]))
        if owner is Tensor.is_cuda:
            return place(args[0]).startswith("cuda")
        found = func(*args)
        return put(found, place(args[0])) if owner is Tensor.grad else found

    def _where(self, func: Any, args: Any, kwargs: dict[str, Any]) -> str:
        """Return where the result is to be, or raise."""
        tensors = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
        asked = kwargs.get("device")
        noise = kwargs.get("generator")
        if noise is not None:
            of = str(asked) if asked is not None else place(tensors[0]) if tensors else "cpu"
            if str(getattr(noise, "place", "cpu")).partition(":")[0] != of.partition(":")[0]:
                raise OtherDeviceError(f"{func} is given a generator of another device than {of}")
        if asked is not None:
            return str(asked)
        places = {place(t) for t in tensors}
        if len(places) <= 1:
            return places.pop() if places else "cpu"
        if func is Tensor.copy_:
            return place(args[0])
        self.judged += 1
        answer = self._by_fakes(func, args, kwargs)
        return self._by_rule(func, args, tensors) if answer is None else answer

    def _by_fakes(self, func: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
        """Return where fake tensors say that the result is; None if they cannot."""

        def fake(value: Any) -> Any:
            """Return a fake tensor like a tensor."""
            if not isinstance(value, Tensor):
                return value
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=place(value))

        try:
            with torch.no_grad(), self._fakes:
                found = func(*tree_map(fake, args), **tree_map(fake, kwargs))
        except Exception as error:
            if any(words in str(error) for words in ("same device", "two different devices")):
                raise OtherDeviceError(f"{func}: {error}") from error
            return None
        return next((str(v.device) for v in tree_flatten(found)[0] if isinstance(v, Tensor)), None)

    def _by_rule(self, func: Any, args: Any, tensors: Sequence[Tensor]) -> str:
        """Return where the result is to be: on the one place but the CPU, for numbers and indices."""
        indexed = func in _CPU_INDICES
        alone = [args[0], *(v for v in args[2:] if isinstance(v, Tensor))] if indexed else tensors
        places = {place(t) for t in alone if t.ndim} | ({place(args[0])} if indexed else set())
        other = {place(t) for t in tensors} - {"cpu"}
        if len(places) > 1 or len(other) > 1:
            raise OtherDeviceError(f"{func} is given tensors on {sorted(places | other)}")
        return (places or other or {"cpu"}).pop()

    def _to_device(self, name: str, value: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return a tensor at another place, a copy if that is another than its own."""
        asked = {"cpu": "cpu", "cuda": FIRST}.get(name, kwargs.pop("device", kwargs.pop("other", None)))
        if name in ("cpu", "cuda"):
            args = ()
        elif args and (args[0] is None or isinstance(args[0], (str, int, torch.device, Tensor))):
            asked, args = args[0], args[1:]
        if isinstance(asked, Tensor):
            args, asked = (asked.dtype, *args), place(asked)
        where = place(value) if asked is None else _NAMES.get(str(asked), str(asked))
        if args and not isinstance(args[0], torch.dtype):
            args = ("cpu", *args)  # the dtype is None
        found = (
            value.to(*args, **{k: v for k, v in kwargs.items() if k != "memory_format"}) if args or kwargs else value
        )
        return put(found.clone() if found is value and where != place(value) else found, where)


def _grouped(lists: Any, with_indices: bool = False) -> Any:
    """Do what optimisers do in C++: part lists of tensors by the device and type of the first list's."""
    keys = [(value.device, value.dtype) for value in lists[0]]
    parts = {key: [n for n, each in enumerate(keys) if each == key] for key in dict.fromkeys(keys)}
    return {key: ([[v[n] for n in part] if v else [] for v in lists], part) for key, part in parts.items()}


class _Generator(torch.Generator):
    """A generator with a place."""

    def __new__(cls, device: object = "cpu") -> _Generator:
        made = super().__new__(cls)
        made.place = str(device)
        return made

    place: str


def _inputs_moved(module: nn.Module, where: str, back: str | None = None) -> None:
    """Do as accelerate's hooks do: what a module is given goes to its place, and what it returns back if asked."""
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        """Run where the module is."""
        found = plain(*send_to_device(args, where), **send_to_device(kwargs, where))
        return found if back is None else send_to_device(found, back)

    module.forward = forward


@contextmanager
def pretended(model: nn.Module, *later: nn.Module) -> Iterator[Pretended]:
    """Put a model on a pretended GPU for a ``with`` block, and these modules of it on a second one.

    The Trainer takes the first for its device.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        put(tensor, FIRST)
    for module in later:
        _inputs_moved(module, SECOND)
        for tensor in (*module.parameters(), *module.buffers()):
            put(tensor, SECOND)
    memory = {"mem_get_info": (2**30, 2**31), "memory_reserved": 0, "memory_allocated": 0}
    gpu = PropertyMock(return_value=torch.device(FIRST))
    with ExitStack() as changes:
        changes.enter_context(patch("torch.Generator", _Generator))
        for user in ("torch.nn.utils.clip_grad", "torch.optim.optimizer"):
            changes.enter_context(patch(f"{user}._group_tensors_by_device_and_dtype", _grouped))
        for owner in (TrainingArguments, Accelerator):
            changes.enter_context(patch.object(owner, "device", gpu))
        for name, value in memory.items():
            changes.enter_context(patch(f"torch.cuda.{name}", return_value=value))
        yield changes.enter_context(Pretended())


@contextmanager
def dispatched(model: Any) -> Iterator[Pretended]:
    """Spread a model over two pretended GPUs as ``device_map="auto"`` does, with its outputs back on the first."""
    model.hf_device_map = {"model": FIRST, "lm_head": SECOND}  # by which the Trainer knows
    _inputs_moved(model.get_base_model(), FIRST, FIRST)
    with pretended(model, *later_half(model)) as mode:
        yield mode


def later_half(model: Any) -> tuple[nn.Module, ...]:
    """Return what is to be on a second GPU: the last layers, the last norm and the head."""
    base = model.get_base_model()
    layers = base.model.layers
    return (*layers[len(layers) // 2 :], base.model.norm, base.lm_head)


def moved(work: Callable[[Any], Any], make: Callable[[], Any], *, apart: bool = False) -> tuple[Any, Any]:
    """Return what is found on the CPU, and on one pretended GPU, or two."""
    plain, other = make(), make()
    wanted = work(plain)
    with pretended(other, *(later_half(other) if apart else ())):
        return wanted, work(other)
