"""Philox-4x64-10: random bits that are a function of a key and a counter, and so the same on every device.

Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3" (SC11, section 3.3), which passes
TestU01's BigCrush. On a CPU numpy makes the bits, whose `numpy.random.Philox` keeps its stream from release to release;
elsewhere they are made on the device by tensor operations on 64-bit integers, with nothing to compile.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayeslora._typing import Int

Words = tuple[int, int]
"""128 bits as two unsigned integers of 64."""

AT_ONCE = 2**19
"""Blocks of 256 bits that are made at once on an accelerator: some 60 MiB while they are made."""
BLOCK = 8
"""Numbers of 32 bits in a block."""
_LOW = 2**32 - 1
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10


def words_of(*key: object) -> Words:
    """Return the 128 bits that a key stands for, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


Piece = tuple[str, int, int]
"""A name, the number of the first of its blocks, and how many of them."""


def random_bits(key: Words, pieces: Sequence[Piece], device: torch.device) -> Int[Tensor, " n"]:
    """Return random numbers of 32 bits, eight for each block of the pieces, one piece after another; int32.

    Those of a name are a function of the key, the name and their place: block j is that of the counter (j + 1, the
    name's 128 bits, 0), and each of its 64-bit words gives its low half first.
    """
    if device.type == "cpu":
        return torch.from_numpy(_numpy_bits(key, pieces))
    parts = [torch.stack(philox(_counter(some, device), key), dim=-1).view(-1) for some in _at_once(pieces)]
    return torch.cat(parts).view(torch.int32)


def _numpy_bits(key: Words, pieces: Sequence[Piece]) -> NDArray[np.int32]:
    """Return the numbers by numpy's generator, which counts up before each block."""
    stream = np.random.Philox(key=np.array(key, dtype=np.uint64))
    state, parts = stream.state, []
    for name, first, blocks in pieces:
        state["state"]["counter"] = np.array([first, *words_of(name), 0], dtype=np.uint64)
        stream.state = state
        parts.append(stream.random_raw(BLOCK // 2 * blocks).view(np.int32))
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _at_once(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Yield pieces of at most `AT_ONCE` blocks together, in order."""
    some, room = list[Piece](), AT_ONCE
    for name, first, blocks in pieces:
        while blocks:
            taken = min(blocks, room)
            some.append((name, first, taken))
            first, blocks, room = first + taken, blocks - taken, room - taken
            if not room:
                yield some
                some, room = [], AT_ONCE
    if some:
        yield some


def _counter(pieces: Sequence[Piece], device: torch.device) -> list[Int[Tensor, " B"]]:
    """Return the four words of the counters of some pieces' B blocks."""
    *before, total = itertools.accumulate([0, *(blocks for _, _, blocks in pieces)])
    table = [
        (first + 1 - past, *map(_signed, words_of(name)), blocks)
        for (name, first, blocks), past in zip(pieces, before, strict=True)
    ]
    rows = torch.tensor(table, device=device)
    rows = rows.repeat_interleave(rows.select(1, 3), 0, output_size=total)
    place, low, high, _ = rows.unbind(1)
    return [place + torch.arange(total, device=device), low, high, torch.zeros_like(place)]


def philox(counter: Sequence[Int[Tensor, " B"]], key: Words) -> list[Int[Tensor, " B"]]:
    """Return the four 64-bit words of each of B blocks, as int64 with the bits of the unsigned numbers.

    Args:
        counter: The four words of the counters, int64 likewise.
        key: The key's two words.
    """
    a, b, c, d = counter
    for number in range(_ROUNDS):
        first, second = (_signed(word + number * step) for word, step in zip(key, _KEY_STEPS, strict=True))
        (high_a, low_a), (high_c, low_c) = _product(a, _MULTIPLIERS[0]), _product(c, _MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
    return [a, b, c, d]


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return high and low word of the unsigned product, by halves: int64 keeps the low bits of every product."""
    low, high = word & _LOW, (word >> 32) & _LOW
    factor_low, factor_high = factor & _LOW, factor >> 32
    middle = high * factor_low + ((low * factor_low >> 32) & _LOW)
    carried = low * factor_high + (middle & _LOW)
    return high * factor_high + ((middle >> 32) & _LOW) + ((carried >> 32) & _LOW), word * _signed(factor)


def _signed(word: int) -> int:
    """Return the signed integer with the low 64 bits of an unsigned one."""
    word &= 2**64 - 1
    return word - 2**64 if word >> 63 else word
