"""The numbers that draws are made of: standard normal or uniform, a function of seed, draw, parameter and place.

They are Box and Muller's of the bits of `bayeslora.posteriors.philox`, made where the posterior's tensors are, and the
same there as elsewhere up to the last bits of logarithm, root, sine and cosine. Posteriors that were written before
format version 3 keep the numbers of torch's generator, which the CPU alone can make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import final

import torch
from torch import Tensor

from bayeslora._typing import Float, Int
from bayeslora.params import Params, generator
from bayeslora.posteriors.philox import BLOCK, Words, random_bits, words_of
from bayeslora.posteriors.sampling import GROUPS, Sampling
from bayeslora.posteriors.sobol import DIGITS, sobol_point

PHILOX, MERSENNE_TWISTER = "philox-4x64-10", "mt19937"
"""What draws are made from, as it stands in a posterior's folder: today's, and that of format versions 1 and 2."""

_CPU_PAIRS, _DEVICE_PAIRS = 2**18, 2**21
"""Pairs of numbers that go through an operation at once: 1 MiB, and 8 MiB."""

Numbers = Iterator[tuple[str, Tensor]]
"""Numbers by the name of a parameter, in its shape and on its device; whoever takes them may change them."""


@final
class Noise:
    """The noise of one posterior, from a `source`: `PHILOX` or `MERSENNE_TWISTER`.

    For simplex draws ``sums`` keeps one sum by parameter from a draw to the next of its group: as much as a draw.
    """

    def __init__(self, source: str = PHILOX) -> None:
        self.source = source
        self.sums: dict[tuple[int, int, int], Params] = {}

    def normal(self, like: Params, index: int, seed: int, sampling: Sampling = "independent") -> Numbers:
        """Yield standard normal numbers of one draw for each parameter, float32."""
        if sampling == "sobol":
            return ((name, torch.special.ndtri(u).float()) for name, u in self._sobol(like, index, seed))
        if sampling == "simplex":
            return self._simplex(like, index, seed)
        mirror = index % 2 if sampling == "antithetic" else 0
        numbers = self._independent(like, (seed, index - mirror), _normal, torch.randn)
        return ((name, z.neg_()) for name, z in numbers) if mirror else numbers

    def uniform(self, like: Params, index: int, seed: int, sampling: Sampling = "independent") -> Numbers:
        """Yield numbers uniform on [0, 1] of one draw for each parameter, float32."""
        if sampling == "sobol":
            return ((name, u.float()) for name, u in self._sobol(like, index, seed))
        if sampling == "simplex":
            return ((name, torch.special.ndtr(z)) for name, z in self._simplex(like, index, seed))
        mirror = index % 2 if sampling == "antithetic" else 0
        numbers = self._independent(like, (seed, index - mirror), _uniform, torch.rand)
        return ((name, 1 - u) for name, u in numbers) if mirror else numbers

    def _independent(
        self,
        like: Params,
        key: tuple[object, ...],
        of_bits: Callable[[Words, Params], Numbers],
        of_generator: Callable[..., Tensor],
    ) -> Numbers:
        """Yield independent numbers for each parameter."""
        if self.source == PHILOX:
            return of_bits(words_of(*key), like)
        return ((n, of_generator(x.shape, generator=generator(*key, n)).to(x.device)) for n, x in like.items())

    def _sobol(self, like: Params, index: int, seed: int) -> Numbers:
        """Yield a point of Sobol's sequence for each parameter, in (0, 1), float64."""
        for name, shift in self._shifts(like, seed):
            yield name, sobol_point(seed, index, name, shift).view(like[name].shape)

    def _shifts(self, like: Params, seed: int) -> Numbers:
        """Yield random digits for each parameter, int64, flat."""
        if self.source == PHILOX:
            for name, x in like.items():
                yield name, _bits(words_of(seed, "sobol"), name, x).long() & (2**DIGITS - 1)
            return
        for name, x in like.items():
            digits = torch.randint(0, 2**DIGITS, (x.numel(),), generator=generator(seed, "sobol", name))
            yield name, digits.to(x.device)

    def _simplex(self, like: Params, index: int, seed: int) -> Numbers:
        """Yield numbers that sum to zero over the K draws of a group; any two of a place correlate by -1/(K-1)."""
        # This is the most negative correlation that K exchangeable normal numbers can have (antithetic coupling of K
        # processes: Craiu and Meng 2005, Annals of Statistics 33). A group's average of what is linear in the noise is
        # exact, as with pairs that mirror each other. Its average of what is quadratic is worth K − 1 independent
        # draws; a pair's is worth one.
        #
        # z_i = √(K/(K−1)) (√((K−1−i)/(K−i)) ε_i − Σ_{j<i} ε_j/√((K−1−j)(K−j))): K − 1 independent ε and Helmert's
        # orthonormal contrasts. A draw takes those before it as one sum, which the draw before has left, or makes it.
        size = GROUPS["simplex"]
        group, place = divmod(index, size)
        if self.source != PHILOX:
            for name, x in like.items():
                every = torch.randn((size, *x.shape), generator=generator(seed, "simplex", group, name))
                yield name, (math.sqrt(size / (size - 1)) * (every[place] - every.mean(0))).to(x.device)
            return
        sums = self.sums.pop((seed, group, place), None)
        if sums is None or sums.keys() != like.keys():
            sums = _sum(like, seed, group, place)
        whole = math.sqrt(size / (size - 1))
        if place == size - 1:
            for name in like:
                yield name, sums[name] * -whole
            return
        own, after = whole * math.sqrt((size - 1 - place) / (size - place)), dict[str, Tensor]()
        for name, fresh in _contrast(like, seed, group, place):
            z = fresh * own
            after[name] = _added(sums.get(name), fresh, place)
            yield name, z.sub_(sums[name], alpha=whole) if place else z
        self.sums = {(seed, group, place + 1): after}


def _contrast(like: Params, seed: int, group: int, place: int) -> Numbers:
    """Yield the independent numbers ε that a place of a simplex adds."""
    return _normal(words_of(seed, "simplex", group, place), like)


def _sum(like: Params, seed: int, group: int, place: int) -> Params:
    """Return a simplex's sum over the places before one, for each parameter; nothing for the first."""
    sums: Params = {}
    for before in range(place):
        for name, fresh in _contrast(like, seed, group, before):
            sums[name] = _added(sums.get(name), fresh, before)
    return sums


def _added(total: Tensor | None, fresh: Tensor, place: int) -> Tensor:
    """Return a simplex's sum with a place's numbers, which are used up, added; the sum itself is left as it is."""
    weight = 1 / math.sqrt((GROUPS["simplex"] - 1 - place) * (GROUPS["simplex"] - place))
    return fresh.mul_(weight) if total is None else torch.add(total, fresh, alpha=weight, out=fresh)


def _by_device(like: Mapping[str, Tensor]) -> Iterable[tuple[torch.device, list[str]]]:
    """Return the devices of some tensors, each with the names of those that are there."""
    names: dict[torch.device, list[str]] = {}
    for name, x in like.items():
        names.setdefault(x.device, []).append(name)
    return names.items()


def _normal(key: Words, like: Params) -> Numbers:
    """Yield independent standard normal numbers for each parameter, small ones made together."""
    for device, names in _by_device(like):
        for group in _groups({name: like[name].numel() for name in names}, device):
            blocks = {name: -(-pairs // BLOCK) for name, pairs in group.items()}
            radii = [(name, 0, count) for name, count in blocks.items()]
            bits = random_bits(key, [*radii, *((name, count, count) for name, _, count in radii)], device)
            both = box_muller(bits)
            start = 0
            for name, pairs in group.items():
                z = both.narrow(1, start, pairs).reshape(-1).narrow(0, 0, like[name].numel())
                yield name, z.view(like[name].shape)
                start += BLOCK * blocks[name]


def _groups(sizes: Mapping[str, int], device: torch.device) -> Iterator[dict[str, int]]:
    """Yield names with their pairs of numbers: a large one alone, small ones up to what is made at once."""
    most = _CPU_PAIRS if device.type == "cpu" else _DEVICE_PAIRS
    group: dict[str, int] = {}
    for name, size in sizes.items():
        pairs = -(-size // 2)
        if group and sum(group.values()) + pairs > most:
            yield group
            group = {}
        group[name] = pairs
    if group:
        yield group


def _uniform(key: Words, like: Params) -> Numbers:
    """Yield independent numbers uniform on [0, 1] for each parameter."""
    for name, x in like.items():
        yield name, _fraction(_bits(key, name, x)).view(x.shape)


def _bits(key: Words, name: str, like: Tensor) -> Int[Tensor, " n"]:
    """Return as many random numbers of 32 bits as a parameter has, on its device."""
    return random_bits(key, [(name, 0, -(-like.numel() // BLOCK))], like.device).narrow(0, 0, like.numel())


def _fraction(bits: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return 31 of each number's bits as a number in [0, 1], those near 0 with all their digits."""
    return (bits & (2**31 - 1)).float().mul_(2**-31)


def box_muller(bits: Int[Tensor, " 2n"]) -> Float[Tensor, "2 n"]:
    """Return standard normal numbers, √(−2 ln u) times cosine and sine of an angle, from bits.

    Box and Muller 1958, Annals of Mathematical Statistics 29. The first half of the bits gives the radii, by u in
    [2^-32, 1] so that no number is beyond 6.7, and the second the angles.
    """
    pairs = len(bits) // 2
    step = _CPU_PAIRS if bits.device.type == "cpu" else _DEVICE_PAIRS
    numbers = torch.empty(2, pairs, device=bits.device)
    cosines, sines = numbers.unbind()
    for start in range(0, pairs, step):
        size = min(step, pairs - start)
        radii = _fraction(bits.narrow(0, start, size)).add_(2**-32).log_().mul_(-2).sqrt_()
        angles = bits.narrow(0, pairs + start, size).float().mul_(math.pi * 2**-31)
        torch.cos(angles, out=cosines.narrow(0, start, size)).mul_(radii)
        torch.sin(angles, out=sines.narrow(0, start, size)).mul_(radii)
    return numbers
