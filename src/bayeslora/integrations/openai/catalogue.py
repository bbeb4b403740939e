"""What a server of adapters says that it serves, as ``/v1/models`` lists it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from bayeslora._typing import Tokenizer
from bayeslora.errors import InputError, listed


@final
@dataclass(frozen=True)
class Catalogue:
    """A server's adapters, each with the place that it was loaded from, and its base model.

    ``software`` is ``vllm``, ``bayeslora`` (our own server) or another; ``base`` and ``base_root``, its place, are
    empty where the server does not say which model is the base of the adapters.
    """

    software: str
    models: Mapping[str, str]
    adapters: tuple[str, ...]
    base: str = ""
    base_root: str = ""

    @classmethod
    def of(cls, answer: Mapping[str, object]) -> Catalogue:
        """Return what an answer of ``/v1/models`` says; an adapter is a model that has another as its parent."""
        data = answer.get("data")
        models = [model for model in data if isinstance(model, dict)] if isinstance(data, list) else []
        roots = {str(model.get("id")): str(model.get("root") or "") for model in models}
        parents = {str(model["id"]): str(model["parent"]) for model in models if model.get("parent")}
        base = next(iter(parents.values()), "")
        software = next((str(model["owned_by"]) for model in models if model.get("owned_by")), "")
        return cls(software, roots, tuple(parents), base, roots.get(base, ""))

    @property
    def counts_by_tokens(self) -> bool:
        """Whether texts are scored by generated tokens here: on vLLM, whose echo leaves out what adapts the head."""
        return self.software == "vllm"

    @property
    def bears_batches(self) -> bool:
        """Whether several texts may be echoed in one request: a batch of them ends vLLM's engine on CPUs."""
        return self.software == "bayeslora"

    def chosen(self, names: Sequence[str], server: str) -> tuple[str, ...]:
        """Return the adapters that are named, or all if none is; refuse names that the server does not have."""
        if names:
            for name in names:
                if name not in self.models:
                    raise InputError(f"{server} has no adapter {name!r}; it has {listed(self.adapters or self.models)}")
            return tuple(names)
        if not self.adapters:
            raise InputError(
                f"{server} calls none of its models an adapter ({listed(self.models) or 'none'}); start it with the "
                "line that bayeslora export prints, or name them, names=[…]"
            )
        return self.adapters

    def check_same(self, before: Catalogue, names: Sequence[str], server: str) -> None:
        """Refuse adapters that are not those of an earlier request."""
        was, now = ({name: c.models.get(name) for name in names or c.adapters} for c in (before, self))
        changed = [name for name in dict.fromkeys([*was, *now]) if was.get(name) != now.get(name)]
        if changed:
            raise InputError(
                f"{server} has changed its adapters between requests ({listed(changed)}); leave them as they are, and "
                "connect anew"
            )

    def tokenizer(self, server: str) -> Tokenizer:
        """Return the tokenizer of the server's base model, read from the place that the server names."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.base_root)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{server} has the base model {self.base_root!r}, whose tokenizer is not to be had here; pass it, "
                "tokenizer=…"
            ) from error
