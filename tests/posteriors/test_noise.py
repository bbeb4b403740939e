"""What draws are made of: the generator's published answers, its numbers' distribution, and where they are made.

The seeds are fixed, so a test passes always or never. Each statistic is within five of its deviations, which chance
exceeds once in 1.7 million, or within the bound of Kolmogorov's distribution that it exceeds once in a million.
"""

import gc
import itertools
import math
from dataclasses import replace

import pytest
import torch
from support.families import A0, FAMILIES, normal, vector
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from bayeslora.posteriors import DiagonalGaussian, Draws, Posterior
from bayeslora.posteriors.keeping import CACHED_NUMBERS, numbers
from bayeslora.posteriors.noise import MERSENNE_TWISTER, PHILOX, Noise, box_muller
from bayeslora.posteriors.philox import philox, random_bits, words_of

CPU = torch.device("cpu")
SAMPLINGS = ["independent", "antithetic", "simplex", "sobol"]
SIZE = 2**18
ONE_IN_A_MILLION = math.sqrt(math.log(2e6) / 2)  # of √n times Kolmogorov's distance

# https://github.com/DEShawResearch/random123, tests/kat_vectors, philox4x64 with 10 rounds: counter, key, words
KNOWN = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
    ),
    (
        (2**64 - 1,) * 4,
        (2**64 - 1,) * 2,
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
]


def signed(words):
    return [torch.tensor([word - 2**64 if word >> 63 else word]) for word in words]


def numbers_of(kind, index, seed, like, sampling="independent", noise=None):
    return dict(getattr(noise or Noise(), kind)(like, index, seed, sampling))


def stream(index, seed, name, sampling="independent", size=SIZE):
    return numbers_of("normal", index, seed, {name: torch.empty(size)}, sampling)[name].double()


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_generator_gives_its_published_answers(counter, key, words):
    assert [int(w) % 2**64 for w in philox(signed(counter), key)] == list(words)


def test_tensor_operations_make_the_bits_that_numpy_makes():
    key = words_of("any key")
    count = 4000
    low, high = signed(words_of("a name"))
    places = torch.arange(1, count // 8 + 1)
    blocks = philox([places, low.expand_as(places), high.expand_as(places), torch.zeros_like(places)], key)
    bits = random_bits(key, [("a name", 0, count // 8)], CPU)
    assert torch.equal(torch.stack(blocks, -1).view(-1).view(torch.int32), bits)


@pytest.mark.parametrize("sizes", [(1, 23), (24, 5), (40_000, 600_001, 2)])
def test_numbers_are_box_and_mullers_of_the_bits_of_seed_draw_and_name(sizes):
    like = {f"parameter {k}": torch.empty(size) for k, size in enumerate(sizes)}
    for name, z in numbers_of("normal", 2, 9, like).items():
        pairs = -(-z.numel() // 2)
        blocks = -(-pairs // 8)
        bits = random_bits(words_of(9, 2), [(name, 0, 2 * blocks)], CPU).double()
        u = (bits[:pairs] % 2**31).float() * 2**-31 + 2**-32  # rounded alike on every device
        radius = u.double().log().mul(-2).sqrt()
        angle = bits[8 * blocks : 8 * blocks + pairs] * math.pi * 2**-31
        wanted = torch.cat([radius * angle.cos(), radius * angle.sin()])[: z.numel()]
        torch.testing.assert_close(z.double(), wanted, rtol=0, atol=3e-6)


def test_numbers_of_a_name_do_not_depend_on_the_others():
    a, b = (numbers_of("normal", 3, 4, {n: torch.empty(size)})[n] for n, size in (("a", 41), ("b", 70_001)))
    both = numbers_of("normal", 3, 4, {"c": torch.empty(6, 6), "b": torch.empty(70_001), "a": torch.empty(41)})
    assert torch.equal(both["a"], a)
    assert torch.equal(both["b"], b)
    u = numbers_of("uniform", 3, 4, {"a": torch.empty(41)})["a"]
    assert torch.equal(numbers_of("uniform", 3, 4, {"b": torch.empty(3), "a": torch.empty(100)})["a"][:41], u)
    whole = random_bits(words_of(3), [("a", 0, 6)], CPU)
    assert torch.equal(random_bits(words_of(3), [("b", 0, 1), ("a", 2, 3)], CPU)[8:], whole[16:40])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 600_001])
def test_every_size_is_served(size):
    z = stream(0, 0, "x", size=size)
    assert z.shape == (size,)
    assert bool(torch.isfinite(z).all())


def test_the_extremes_of_the_bits_give_finite_numbers():
    extreme = [0, -1, 2**31 - 1, -(2**31), 1, -2]
    bits = torch.tensor([*extreme, *extreme[::-1], *extreme, *extreme], dtype=torch.int32)
    z = box_muller(bits)
    assert bool(torch.isfinite(z).all())
    largest = math.sqrt(64 * math.log(2))
    assert float(z.abs().max()) == pytest.approx(largest, rel=1e-6)  # of u = 2^-32 at the angle 0


@pytest.mark.parametrize(
    ("index", "seed", "name"), [(0, 0, "x"), (1, 0, "x"), (0, 1, "x"), (0, 0, "y"), (9, 2**40, A0)]
)
def test_numbers_are_normal(index, seed, name):
    z = stream(index, seed, name)
    assert abs(float(z.mean())) < 5 / math.sqrt(SIZE)
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / SIZE)
    assert abs(float(z.pow(3).mean())) < 5 * math.sqrt(15 / SIZE)
    assert abs(float(z.pow(4).mean()) - 3) < 5 * math.sqrt(96 / SIZE)
    below = torch.special.ndtr(z.sort().values)
    distance = (below - torch.arange(1, SIZE + 1) / SIZE).abs().max()
    assert float(distance) * math.sqrt(SIZE) < ONE_IN_A_MILLION
    tail = torch.special.ndtr(torch.tensor(-4.0).double()) * 2 * SIZE  # some 17 beyond four deviations
    assert abs(int((z.abs() > 4).sum()) - tail) < 5 * math.sqrt(tail)


def test_numbers_are_uniform():
    u = numbers_of("uniform", 2, 3, {"x": torch.empty(SIZE)})["x"].double()
    assert float(u.min()) >= 0
    assert float(u.max()) <= 1
    distance = (u.sort().values - torch.arange(1, SIZE + 1) / SIZE).abs().max()
    assert float(distance) * math.sqrt(SIZE) < ONE_IN_A_MILLION
    counts = torch.histc(u, 256, 0, 1)
    assert abs(float(((counts - SIZE / 256).square() / (SIZE / 256)).sum()) - 255) < 5 * math.sqrt(2 * 255)


STREAMS = [
    *((k, 0, "x") for k in range(6)),
    *((0, s, "x") for s in (1, 2, 2**32, 2**63)),
    *((0, 0, name) for name in ("y", "x ", "base_model.layers.1.lora_A.weight", "base_model.layers.11.lora_A.weight")),
    (1, 1, "y"),
]


def test_draws_seeds_parameters_and_neighbours_are_independent():
    # 120 pairs of streams and 6 of a stream with itself moved on, by their products and by the products of their
    # squares: 5 deviations are exceeded by chance in one of 7,000 choices of the seeds
    drawn = [stream(*key) for key in STREAMS]
    halves = drawn[0][: SIZE // 2], drawn[0][SIZE // 2 :]  # cosine and sine of the same radius and angle
    pairs = [*itertools.combinations(drawn, 2), halves, *((drawn[0][:-k], drawn[0][k:]) for k in (1, 2, 4, 8, 64))]
    for a, b in pairs:
        assert abs(float((a * b).mean())) * math.sqrt(len(a)) < 5
        assert abs(float(((a.square() - 1) * (b.square() - 1)).mean())) / 2 * math.sqrt(len(a)) < 5


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("source", [PHILOX, MERSENNE_TWISTER])
def test_a_draw_is_the_same_in_any_order(source, sampling, kind):
    like = {"x": torch.empty(3, 4), "y": torch.empty(5)}
    noise, order = Noise(source), [0, 1, 2, 3, 4, 8, 7, 4, 5, 6, 7, 2, 3, 3, 9, 12]
    for index in order:
        found = numbers_of(kind, index, 5, like, sampling, noise)
        alone = numbers_of(kind, index, 5, like, sampling, Noise(source))
        assert {name: value.shape for name, value in found.items()} == {"x": (3, 4), "y": (5,)}
        assert all(torch.equal(found[name], alone[name]) for name in like)
    partly = noise.normal(like, 0, 5, sampling)
    next(partly)  # and no more of it
    for index in (1, 2):
        assert torch.equal(
            numbers_of("normal", index, 5, like, sampling, noise)["y"],
            numbers_of("normal", index, 5, like, sampling, Noise(source))["y"],
        )


def test_simplex_draws_keep_one_sum_between_them_and_none_after_their_group():
    like, noise = {"x": torch.empty(3, 4), "y": torch.empty(5)}, Noise()
    for index in range(10):
        numbers_of("normal", index, 0, like, "simplex", noise)
        kept = [value.numel() for sums in noise.sums.values() for value in sums.values()]
        assert sum(kept) == (0 if index % 5 == 4 else 17)


class Roots(TorchFunctionMode):
    """Counts square roots of posteriors' numbers; those of radii are in place."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in ("sqrt", "rsqrt")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("family", ["diagonal", "low-rank", "kronecker", "mixture"])
def test_the_roots_of_a_posterior_are_taken_once(family):
    posterior = FAMILIES[family]()
    with Roots() as first:
        posterior.draw(0), posterior.draw(1)
    with Roots() as later:
        posterior.draw(2), posterior.draw(3, 1, "antithetic")
    assert (first.count > 0, later.count) == (True, 0)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS[:3])  # Sobol's direction numbers torch makes on the CPU alone
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_numbers_for_an_accelerator_are_made_on_it(kind, sampling, monkeypatch):
    """On a pretended device, where an operation that mixes devices raises."""
    monkeypatch.setattr("bayeslora.posteriors.philox.AT_ONCE", 3)
    with FakeTensorMode():
        like = {name: torch.empty(shape, device="cuda") for name, shape in (("x", (4, 6)), ("y", (3,)), ("z", (77,)))}
        noise = Noise()
        for index in range(6):
            found = numbers_of(kind, index, 0, like, sampling, noise)
            assert {name: (value.shape, value.device.type) for name, value in found.items()} == {
                name: (value.shape, "cuda") for name, value in like.items()
            }
            assert all(isinstance(value, FakeTensor) for value in found.values())


def large(size):
    shape = {"x": torch.zeros(size)}
    return DiagonalGaussian(shape, {"x": torch.ones(size)})


def test_predictions_keep_draws_up_to_a_bound():
    posterior = large(CACHED_NUMBERS // 3 - 1)
    drawn = [posterior.cached_draw(k, Draws(5)) for k in range(5)]
    again = [posterior.cached_draw(k, Draws(5)) for k in range(5)]
    assert [one is other for one, other in zip(drawn, again, strict=True)] == [True, True, True, False, False]
    assert torch.equal(drawn[4]["x"], again[4]["x"])
    del drawn, again, posterior
    gc.collect()


def test_the_size_of_a_posterior_counts_what_it_is_made_of():
    diagonal, low_rank = FAMILIES["diagonal"](), FAMILIES["low-rank"]()
    assert numbers(diagonal) == 2 * 16 + 3
    assert numbers(low_rank) == 16 * (2 + 4) + 3
    assert numbers(FAMILIES["mixture"]()) == numbers(diagonal) + numbers(low_rank)
    assert numbers(FAMILIES["scaled"]()) == numbers(diagonal) + 4


def test_the_copy_elsewhere_is_made_once_and_draws_alike():
    for make in FAMILIES.values():
        posterior: Posterior = make()
        devices = dict.fromkeys(posterior.mean, CPU)
        copy = posterior.placed(devices)
        assert copy is posterior.placed(dict(devices))
        assert copy is not posterior.placed({A0: CPU})
        assert torch.equal(vector(copy.draw(3, 2)), vector(posterior.draw(3, 2)))


def test_a_draw_is_its_owners_and_changing_it_changes_no_other():
    posterior = replace(FAMILIES["diagonal"](), mean=FAMILIES["diagonal"]().mean | {A0: normal((2, 3), 3)})
    for sampling in SAMPLINGS:
        wanted = [vector(posterior.draw(k, 0, sampling)) for k in range(5)]
        for k in range(5):
            draw = posterior.draw(k, 0, sampling)
            assert torch.equal(vector(draw), wanted[k])
            draw[A0].zero_()
