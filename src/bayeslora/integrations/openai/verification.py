"""Whether a server answers as the posterior does here: a few rows under each adapter, set against rounding.

What bf16's rounding does to the answers is estimated here, adapter by adapter: every layer's output is moved by up to
half the distance between two numbers of bf16, at random, and the answers are compared. An adapter of the server that
differs by several times as much is not the draw whose name it has, or is not applied as PEFT applies it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import cast, final

import torch
from torch import Tensor, nn

from bayeslora._typing import Float, Tokenizer
from bayeslora.errors import InputError, listed
from bayeslora.metrics.prediction import Prediction
from bayeslora.params import Params, generator
from bayeslora.posteriors import Draws, Mixture, Point, Posterior
from bayeslora.posteriors.provenance import Origin
from bayeslora.prediction import PassOptions, predict
from bayeslora.tasks.synthetic import chance_task
from bayeslora.tasks.types import Format, Normalisation, Split

BF16_EPSILON = 2.0**-8
"""Largest relative error of a number that is rounded to bf16."""
FLOOR = 0.005
"""Nats below which no difference is told from rounding."""
FACTOR = 4.0
"""How many times the rounding an adapter may differ by: rounding is estimated from one pass over few rows."""
_NUMBERED = re.compile(r"-(\d{3,})(-[0-9a-f]{8})?$")
_MEAN = re.compile(r"(^|[-/])mean(-[0-9a-f]{8})?$")


@final
@dataclass(frozen=True)
class Reference:
    """What a server's answers are verified against.

    Attributes:
        model: PEFT model with the base that the posterior was trained on.
        posterior: What was exported.
        draws: Seed and sampling of the export.
    """

    model: nn.Module
    posterior: Posterior
    draws: Draws = field(default_factory=Draws)


@final
@dataclass(frozen=True)
class Verification:
    """How far each adapter of a server is from its draw here.

    Attributes:
        names: The K models compared: the server's base model, where it is known, and its adapters.
        differences: Root mean square over rows and choices of the difference between log-probabilities, in nats [K].
        rounding: The same distance between answers here, and those here with bf16's rounding [K].
        base: The server's name of its base model; empty if it does not say it.
        readout: How answers were read.
        rows: How many rows were compared.
    """

    names: tuple[str, ...]
    differences: Float[Tensor, " K"]
    rounding: Float[Tensor, " K"]
    base: str
    readout: str
    rows: int

    @property
    def differing(self) -> tuple[str, ...]:
        """The models that differ from their draws by more than rounding."""
        limits = (FACTOR * self.rounding).clamp(min=FLOOR)
        far = ~(self.differences <= limits)  # also where it is not a number
        return tuple(name for name, differs in zip(self.names, far.tolist(), strict=True) if differs)

    def table(self) -> str:
        """Return a line for each model: its distance, and how many times the rounding that is."""
        wide, far = max(map(len, self.names)), self.differing
        lines = [f"{self.readout}, {self.rows} rows; nats between server and posterior, and what bf16 moves them by"]
        for name, apart, rounding in zip(self.names, self.differences.tolist(), self.rounding.tolist(), strict=True):
            verdict = "differs" if name in far else "agrees"
            lines.append(f"  {name:<{wide}}  {apart:.4f}  {rounding:.4f}  {verdict}")
        return "\n".join(lines)

    def check(self, server: str) -> None:
        """Refuse a server whose base model or adapters differ, in one sentence.

        Args:
            server: What to call it.

        Raises:
            InputError: If they differ.
        """
        far = {name: self.names.index(name) for name in self.differing}
        if self.base in far:
            raise InputError(
                f"{server} has another base model ({self.base}): its log-probabilities are "
                f"{float(self.differences[far[self.base]]):.3f} nats from those here, and rounding makes "
                f"{float(self.rounding[far[self.base]]):.3f}; serve the base that the posterior was trained on"
            )
        if far:
            worst = max(far.values(), key=lambda place: float(self.differences[place].nan_to_num(torch.inf)))
            raise InputError(
                f"{len(far)} of {len(self.names) - bool(self.base)} adapters of {server} differ from their draws by "
                f"more than rounding ({listed(far)}): {self.names[worst]} by {float(self.differences[worst]):.3f} "
                f"nats in the {self.readout} readout, and rounding makes {float(self.rounding[worst]):.3f}; export the "
                "draws again, and serve them anew"
            )


def rows_to_verify(rows: int, origin: Origin) -> list[Split]:
    """Return questions about odds, to be answered by letters and by the choices' texts, scored as in training."""
    split = chance_task(1, 1, rows).test
    assert split is not None
    scored = cast(Normalisation, origin.normalisation or "sum")
    forms = [Format("", "letters"), Format("", "likelihood", normalisation=scored)]
    return [replace(split, format=form) for form in forms]


def named_draws(reference: Reference, names: Sequence[str], base: str) -> Posterior:
    """Return what the names of a server's models stand for here; its base model is an adapter of zeros."""
    posterior, origin = reference.posterior, reference.posterior.require_origin()
    adapters = [name for name in names if name != base]
    params = [_params_of(posterior, reference.draws, name, place) for place, name in enumerate(adapters)]
    if base:
        params.insert(0, {name: torch.zeros_like(value) for name, value in posterior.mean.items()})
    return Mixture(tuple(Point(each, origin) for each in params), origin)


def verification(
    server: Float[Tensor, "K N C"],
    model: nn.Module,
    draws: Posterior,
    names: Sequence[str],
    base: str,
    split: Split,
    tokenizer: Tokenizer | None,
) -> Verification:
    """Return how far a server's log-probabilities of a split are from those of the draws that its names stand for."""
    options = PassOptions(stack=False)  # so that every layer is called

    def answers() -> Prediction:
        """Return the answers under each of the draws."""
        return predict(model, draws, split, len(names), mean=False, tokenizer=tokenizer, options=options)

    here = answers()
    with _rounded(model):
        rounded = answers().log_probs
    apart, rounding = _distance(server, here.log_probs), _distance(rounded, here.log_probs)
    return Verification(tuple(names), apart, rounding, base, here.readout or "", len(split))


@contextmanager
def _rounded(model: nn.Module) -> Iterator[None]:
    """Move the output of each layer at random by as much as bf16's rounding may."""
    source = generator("rounding")

    def move(_: nn.Module, args: object, output: object) -> object:
        """Return an output with random relative errors."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        errors = torch.empty(output.shape).uniform_(-BF16_EPSILON, BF16_EPSILON, generator=source)
        return output * (1 + errors).to(output)

    layers = [module for module in model.modules() if not any(True for _ in module.children())]
    hooks = [layer.register_forward_hook(move) for layer in layers if not isinstance(layer, nn.Dropout | nn.Identity)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _distance(one: Float[Tensor, "K N C"], other: Float[Tensor, "K N C"]) -> Float[Tensor, " K"]:
    """Return the root mean square of the differences, without choices that neither has."""
    apart = torch.where(one.isneginf() & other.isneginf(), torch.nan, (one - other).double())
    return apart.square().nanmean((1, 2)).sqrt()


def _params_of(posterior: Posterior, draws: Draws, name: str, place: int) -> Params:
    """Return the weights that an adapter's name stands for: the mean, the draw of its number, or that of its place."""
    if _MEAN.search(name):
        return posterior.mean
    numbered = _NUMBERED.search(name)
    number = int(numbered[1]) if numbered else place
    if posterior.distinct is not None and number >= posterior.distinct:
        raise InputError(
            f"the server has an adapter {name!r}, and the posterior has {posterior.distinct} different draws; name the "
            "adapters of this posterior"
        )
    return posterior.draw(number, draws.seed, draws.sampling)
