"""What a posterior says about a set of examples: the draws' probabilities, what follows from them, and their file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bayeslora._typing import Float, Int
from bayeslora.errors import InputError
from bayeslora.files import atomic_file
from bayeslora.metrics import uncertainty

_FORMAT = "bayeslora.prediction"
_VERSION = 1
_TENSORS = ("log_probs", "mean_log_probs", "monte_carlo_error", "base_log_probs")
_FIELDS = ("components", "truncated", "readout", "seconds")


@dataclass(frozen=True, eq=False)
class Prediction:
    """The probabilities that S draws of the weights give to the choices of N examples.

    Attributes:
        log_probs: Natural logarithms, float32, [S N C]; -inf for choices that an example does not have, and for all
            choices of a draw that was not taken for an example.
        mean_log_probs: The same from one pass at the posterior mean's weights, [N C]; None if there was none.
        components: The mixture member that each draw came from; None for a posterior that is no mixture.
        truncated: Number of examples whose prompt was cut to fit.
        readout: How the answers were read: ``letters``, ``likelihood`` or ``head``.
        seconds: Time that the passes took; None if it was not measured.
        monte_carlo_error: Standard error of each example's probabilities from taking so many draws and not more; None
            if it is not known.
        base_log_probs: What the untuned base says through the same readout, [N C], never scaled; None if it was not
            asked.

    Raises:
        InputError: If a shape, type or row cannot be a prediction.
    """

    log_probs: Float[Tensor, "S N C"]
    mean_log_probs: Float[Tensor, "N C"] | None = None
    components: tuple[int, ...] | None = None
    truncated: int = 0
    readout: str = ""
    seconds: float | None = None
    monte_carlo_error: Float[Tensor, " N"] | None = None
    base_log_probs: Float[Tensor, "N C"] | None = None

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def draws(self) -> int:
        """Number of draws S."""
        return self.log_probs.shape[0]

    @property
    def draws_taken(self) -> Int[Tensor, " N"]:
        """Number of draws of each example."""
        return uncertainty.taken(self.log_probs).sum(0)

    @property
    def log_p(self) -> Float[Tensor, "N C"]:
        """Logarithm of the draws' average probability."""
        return uncertainty.average(self.log_probs)

    @property
    def probs(self) -> Float[Tensor, "N C"]:
        """The draws' average probability."""
        return self.log_p.exp()

    @property
    def answer(self) -> Int[Tensor, " N"]:
        """The most probable choice on average."""
        return self.log_p.argmax(-1)

    @property
    def confidence(self) -> Float[Tensor, " N"]:
        """The average probability of the most probable choice."""
        return self.probs.amax(-1)

    @property
    def entropy(self) -> Float[Tensor, " N"]:
        """Total uncertainty in nats: the entropy of the average."""
        return uncertainty.entropy(self.log_p.double()).to(self.log_probs.dtype)

    @property
    def expected_entropy(self) -> Float[Tensor, " N"]:
        """Uncertainty in nats that knowing the weights would leave: the average of the entropies."""
        return uncertainty.expected_entropy(self.log_probs)

    @property
    def mutual_information(self) -> Float[Tensor, " N"]:
        """Uncertainty in nats that comes from the weights."""
        return uncertainty.mutual_information(self.log_probs)

    @property
    def disagreement(self) -> Float[Tensor, " N"]:
        """Share of draws whose answer is not `answer`."""
        return uncertainty.disagreement(self.log_probs)

    @property
    def between(self) -> Float[Tensor, " N"]:
        """Mutual information between the answer and the mixture member, in nats; 0 for no mixture."""
        return uncertainty.between_within(self.log_probs, self.components or (0,) * self.draws)[0]

    @property
    def within(self) -> Float[Tensor, " N"]:
        """Mutual information that lies within the mixture members, in nats; all of it for no mixture."""
        return uncertainty.between_within(self.log_probs, self.components or (0,) * self.draws)[1]

    @property
    def drift(self) -> Float[Tensor, " N"]:
        """How far tuning has moved the answer: KL(p ‖ p_base) of the average in nats.

        Raises:
            InputError: If the base was not asked.
        """
        return uncertainty.drift(self.log_p, self._base)

    @property
    def likelihood_ratio(self) -> Float[Tensor, " N"]:
        """Log p(answer) − log p_base(answer) in nats, of the average's `answer`; low where the data are foreign.

        Raises:
            InputError: If the base was not asked.
        """
        return uncertainty.likelihood_ratio(self.log_p, self._base)

    @property
    def _base(self) -> Float[Tensor, "N C"]:
        """The base's log-probabilities, where they are there."""
        if self.base_log_probs is None:
            raise InputError("the prediction does not have the base's answers; predict with base=True")
        return self.base_log_probs

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the prediction to one ``.safetensors`` file, whole or not at all.

        Args:
            path: Where to write; missing folders are made, an existing file is replaced.

        Raises:
            InputError: If the file cannot be written there.
        """
        # copies, because the file format asks for tensors that share no memory
        tensors = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name in _TENSORS
            if (tensor := getattr(self, name)) is not None
        }
        fields = {"version": _VERSION, **{name: getattr(self, name) for name in _FIELDS}}
        content = save(tensors, metadata={_FORMAT: json.dumps(fields)})
        target = Path(path)
        try:
            with atomic_file(target) as partial:
                partial.write_bytes(content)
        except OSError as error:
            raise InputError(
                f"cannot write the prediction to {target} ({error.strerror}); choose another path"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Prediction:
        """Read a prediction written by `save`.

        Args:
            path: The ``.safetensors`` file.

        Returns:
            The prediction, on the CPU.

        Raises:
            InputError: If there is no such file, or it is not a whole prediction.
        """
        source = Path(path)
        if not source.is_file():
            raise InputError(f"{source} is not a file; give the .safetensors file that Prediction.save wrote")
        try:
            with safe_open(source, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{source} is truncated or no .safetensors file ({error}); write it again") from error
        if _FORMAT not in metadata:
            raise InputError(
                f"{source} is a .safetensors file but no prediction; give the file that Prediction.save wrote"
            )
        try:
            fields = json.loads(metadata[_FORMAT])
            version, truncated, readout = int(fields["version"]), int(fields["truncated"]), str(fields["readout"])
            components = None if fields["components"] is None else tuple(int(m) for m in fields["components"])
            seconds = None if fields["seconds"] is None else float(fields["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{source} has damaged metadata ({error!r}); write the prediction again") from error
        if version != _VERSION:
            raise InputError(
                f"{source} has format version {version}, not {_VERSION}; read it with the bayeslora that wrote it"
            )
        if not {"log_probs"} <= tensors.keys() <= set(_TENSORS):
            raise InputError(f"{source} holds the tensors {sorted(tensors)}, not those of a prediction; write it again")
        try:
            return cls(components=components, truncated=truncated, readout=readout, seconds=seconds, **tensors)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error


def _validate(prediction: Prediction) -> None:
    """Refuse values that cannot be a prediction; the first bad row is named."""
    log_probs, mean, base = prediction.log_probs, prediction.mean_log_probs, prediction.base_log_probs
    if log_probs.ndim != 3 or log_probs.numel() == 0:
        raise InputError(
            f"log_probs has shape {list(log_probs.shape)}; give [draws, examples, choices] with at least one of each"
        )
    for name, values in (("mean_log_probs", mean), ("base_log_probs", base)):
        if values is not None and values.shape != log_probs.shape[1:]:
            raise InputError(
                f"{name} has shape {list(values.shape)}, log_probs {list(log_probs.shape)}; give both the same rows"
            )
    for name, values in (("log_probs", log_probs), ("mean_log_probs", mean), ("base_log_probs", base)):
        if values is not None:
            _check_rows(name, values)
    if base is not None and bool((lost := (base == -torch.inf) & (log_probs > -torch.inf).any(0)).any()):
        row = int(lost.any(-1).nonzero()[0])
        raise InputError(
            f"base_log_probs: row {row} lacks a choice that the draws have; give the base's answers to the same choices"
        )
    error = prediction.monte_carlo_error
    if error is not None and (error.shape != log_probs.shape[1:2] or bool((error.isnan() | (error < 0)).any())):
        raise InputError("monte_carlo_error is not one number of at least 0 for each example; predict again")
    components = prediction.components
    if components is not None and len(components) != log_probs.shape[0]:
        raise InputError(
            f"components has {len(components)} entries for {log_probs.shape[0]} draws; give one member per draw"
        )
    if prediction.truncated < 0:
        raise InputError(f"truncated is {prediction.truncated}; give the number of examples whose prompt was cut")


def _check_rows(name: str, values: Tensor) -> None:
    """Refuse [S N C] or [N C] log-probabilities that are not float32, or of which a row is NaN or does not sum to 1."""
    if values.dtype != torch.float32:
        raise InputError(f"{name} has type {values.dtype}; give float32 (call .float() on it)")
    total = values.logsumexp(-1)
    bad = ~(total.abs() < 1e-2)
    if values.ndim == 3:
        bad[1:] &= ~(values[1:] == -torch.inf).all(-1)  # draws that were not taken; the first one always is
    if not bool(bad.any()):
        return
    bad = bad.reshape(-1, bad.shape[-1])
    row = int(bad.any(0).nonzero()[0])
    draw = int(bad[:, row].nonzero()[0])
    place = f"{name}: row {row}" + (f" of draw {draw}" if values.ndim == 3 else "")
    if bool(values[..., row, :].isnan().reshape(len(bad), -1)[draw].any()):
        raise InputError(f"{place} is NaN; the model's output overflowed, predict again in float32 or bfloat16")
    raise InputError(f"{place} does not sum to 1; give log-probabilities (log_softmax of the choices' scores)")
