"""How draws of a stream belong together, and how many of them an example takes."""

import math

import pytest
import torch
from support.families import FAMILIES, diagonal, dropout, low_rank, vector
from support.tiny import gaussian, make_model, make_split
from torch.quasirandom import SobolEngine

import bayeslora as bl
from bayeslora.errors import InputError
from bayeslora.params import read
from bayeslora.posteriors import DiagonalGaussian, Draws, Mixture, Point, Scaled
from bayeslora.posteriors.loading import export_draws
from bayeslora.posteriors.noise import Noise
from bayeslora.posteriors.sampling import former_keywords
from bayeslora.posteriors.sobol import sobol_digits
from bayeslora.posteriors.transforms import tempered
from bayeslora.prediction import PassOptions, predict
from bayeslora.prediction.run import rounds

LIKE = torch.empty(4, 6)
CPU = torch.device("cpu")
GAUSSIAN = ["diagonal", "low-rank", "mixture", "kronecker", "linearised", "scaled"]


def noise(seed, index, name, like, sampling):
    return dict(Noise().normal({name: like}, index, seed, sampling))[name]


def uniform(seed, index, name, like, sampling):
    return dict(Noise().uniform({name: like}, index, seed, sampling))[name]


def wide(model):
    mean = read(model)
    return DiagonalGaussian(mean, {name: torch.full_like(value, 0.02) for name, value in mean.items()})


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["antithetic", "simplex", "sobol"])
@pytest.mark.parametrize("index", [0, 3])
def test_each_number_of_a_draw_is_standard_normal_over_the_seeds(sampling, index):
    # 4,000 seeds; every moment is within 5 of its own deviations
    found = torch.stack([noise(seed, index, "x", LIKE, sampling) for seed in range(4000)]).double()
    assert float(found.mean(0).abs().max()) < 5 / math.sqrt(4000)
    assert float((found.var(0) - 1).abs().max()) < 5 * math.sqrt(2 / 4000)
    assert float((found.pow(4).mean(0) - 3).abs().max()) < 5 * math.sqrt(96 / 4000)


@pytest.mark.slow
def test_each_number_of_a_draw_is_uniform_over_the_seeds():
    for sampling in ("antithetic", "simplex", "sobol"):
        found = torch.stack([uniform(seed, 1, "x", LIKE, sampling) for seed in range(4000)]).double()
        assert float((found.mean(0) - 0.5).abs().max()) < 5 / math.sqrt(12 * 4000)
        assert float(found.min()) >= 0
        assert float(found.max()) <= 1


@pytest.mark.parametrize("family", GAUSSIAN)
def test_an_odd_antithetic_draw_mirrors_the_one_before_it(family):
    posterior = FAMILIES[family]()
    step = 2 if family == "mixture" else 1  # a mixture's draws go round its members
    for k in range(step):
        member = posterior.members[k] if isinstance(posterior, Mixture) else posterior
        first, second = (vector(posterior.draw(n, 7, "antithetic")) for n in (k, k + step))
        torch.testing.assert_close((first + second) / 2, vector(member.mean))
        assert torch.equal(first, vector(posterior.draw(k, 7)))


def test_antithetic_masks_of_dropout_are_taken_from_both_ends():
    u, v = (uniform(0, k, "x", LIKE, "antithetic") for k in (0, 1))
    torch.testing.assert_close(u + v, torch.ones_like(u))
    assert not torch.equal(vector(dropout().draw(0, 0, "antithetic")), vector(dropout().draw(1, 0, "antithetic")))


@pytest.mark.parametrize("family", GAUSSIAN)
def test_five_simplex_draws_average_to_the_mean(family):
    posterior = FAMILIES[family]()
    members = posterior.members if isinstance(posterior, Mixture) else (posterior,)
    for k, member in enumerate(members):  # a mixture's draws go round its members
        for group in range(2):
            numbers = [(5 * group + i) * len(members) + k for i in range(5)]
            drawn = torch.stack([vector(posterior.draw(n, 7, "simplex")) for n in numbers])
            torch.testing.assert_close(drawn.mean(0), vector(member.mean), rtol=0, atol=1e-6)  # float32 noise
            assert bool((drawn.var(0) > 0).any())


def test_simplex_draws_of_a_group_correlate_by_a_quarter_and_groups_not_at_all():
    like, seeds = torch.empty(1000), 50
    found = torch.stack([
        torch.stack([noise(seed, k, "x", like, "simplex") for k in range(6)]) for seed in range(seeds)
    ]).double()  # fmt: skip
    correlations = torch.einsum("sin,sjn->ij", found, found) / (seeds * like.numel())
    wanted = torch.full((6, 6), -0.25).double().fill_diagonal_(1.0)
    wanted[5, :5] = wanted[:5, 5] = 0.0
    assert float((correlations - wanted).abs().max()) < 5 * math.sqrt(2 / (seeds * like.numel()))


def test_what_five_simplex_draws_are_worth():
    """The average of a linear function has no variance, and that of a quadratic one the variance of four draws."""
    like = torch.empty(1000)
    squares = torch.stack([
        torch.stack([noise(seed, k, "x", like, "simplex") for k in range(5)]).double().square().mean(0)
        for seed in range(40)
    ])  # fmt: skip
    assert float(squares.var()) == pytest.approx(2 / 4, rel=5 * math.sqrt(6 / 40000))


def test_sobol_points_are_those_of_torch():
    wanted = SobolEngine(5).draw(9, dtype=torch.float64)
    assert torch.equal(torch.stack([sobol_digits(k, 5, CPU) for k in range(9)]).double() / 2**30, wanted)


def test_sobol_draws_fill_every_stratum_of_every_number_once():
    found = torch.stack([uniform(3, k, "x", LIKE, "sobol") for k in range(16)])
    strata = (found * 16).long().sort(0).values
    assert torch.equal(strata, torch.arange(16)[:, None, None].expand(16, *LIKE.shape))


def test_a_parameter_with_more_numbers_than_sobols_dimensions_is_served():
    like = torch.empty(3, SobolEngine.MAXDIM)
    one, other = noise(0, 0, "x", like, "sobol"), noise(0, 1, "x", like, "sobol")
    assert bool((one[0] != one[1]).any())
    correlation = (one.flatten() @ other.flatten()) / one.numel()
    assert float(correlation) < 0  # the second point is in the other half of every number


@pytest.mark.parametrize("make", [diagonal, low_rank])
def test_averages_of_smooth_functions_need_fewer_draws(make):
    posterior = make()
    rng = torch.Generator().manual_seed(0)
    direction = torch.randn(len(vector(posterior.mean)), generator=rng).double()

    def spread(sampling):
        """Deviation over 60 streams of the average of exp(a·θ/20) over eight draws."""
        found = [
            torch.stack([(direction @ vector(posterior.draw(k, seed, sampling)) / 20).exp() for k in range(8)]).mean()
            for seed in range(60)
        ]
        return float(torch.stack(found).std())

    plain = spread("independent")
    assert spread("antithetic") < 0.7 * plain
    assert spread("simplex") < 0.7 * plain
    assert spread("sobol") < 0.7 * plain


def test_examples_stop_when_their_error_is_small_enough(tokenizer):
    model, split = make_model("llama"), make_split("test", 13, 2, classes=False, readout="likelihood")
    posterior = wide(model)
    full = predict(model, posterior, split, Draws(40, 2), tokenizer=tokenizer)
    tolerance = float(full.monte_carlo_error.median()) * 2
    found = predict(model, posterior, split, Draws(40, 2, tolerance=tolerance), tokenizer=tokenizer)
    taken = found.draws_taken
    assert int(taken.min()) < int(taken.max()) <= 40
    assert found.draws == int(taken.max())
    assert bool(((found.monte_carlo_error <= tolerance) | (taken == 40)).all())
    for n, count in enumerate(taken.tolist()):
        torch.testing.assert_close(found.log_probs[:count, n], full.log_probs[:count, n], rtol=0, atol=2e-5)
        assert bool((found.log_probs[count:, n] == -math.inf).all())
    torch.testing.assert_close(found.mean_log_probs, full.mean_log_probs, rtol=0, atol=2e-5)
    again = predict(model, posterior, split, Draws(40, 2, tolerance=tolerance), tokenizer=tokenizer, token_budget=70)
    assert torch.equal(again.draws_taken, taken)


@pytest.mark.parametrize("sampling", ["independent", "antithetic", "simplex"])
def test_members_of_a_mixture_get_equally_many_draws_of_every_example(sampling, tokenizer):
    model, split = make_model("llama"), make_split("test", 9, 2, classes=False, readout="likelihood")
    posterior = Mixture(tuple(tempered(wide(model), t) for t in (1.0, 0.5, 0.1)))
    found = predict(model, posterior, split, Draws(30, sampling=sampling, tolerance=0.01), tokenizer=tokenizer)
    unit = {"independent": 3, "antithetic": 6, "simplex": 15}[sampling]
    assert all(count % unit == 0 for count in found.draws_taken.tolist())
    assert int(found.draws_taken.min()) < 30


def test_scaled_posteriors_stop_by_the_error_of_the_scaled_probabilities(tokenizer):
    model, split = make_model("llama"), make_split("test", 9, 2, classes=False, readout="likelihood")
    flat = {f"{of}.{part}": torch.tensor([1e-4 if part == "weight" else 0.0]) for of in ("draws", "mean")
            for part in ("weight", "bias")}  # fmt: skip
    found = predict(model, Scaled(wide(model), flat), split, Draws(30, tolerance=0.005), tokenizer=tokenizer)
    assert found.draws_taken.tolist() == [4] * 9
    torch.testing.assert_close(found.probs.amax(-1) * (found.probs > 0).sum(-1), torch.ones(9), atol=1e-2, rtol=0)


def test_a_point_and_an_ensemble_of_points_have_no_monte_carlo_error(tokenizer):
    model, split = make_model("llama"), make_split("test", 5, 2, classes=False, readout="letters")
    mean = read(model)
    other = {name: value + 0.1 for name, value in mean.items()}
    for posterior in (Point(mean), Mixture((Point(mean), Point(other)))):
        found = predict(model, posterior, split, Draws(10, sampling="antithetic", tolerance=1e-3), tokenizer=tokenizer)
        assert found.monte_carlo_error.tolist() == [0.0] * 5
        assert found.draws == len(getattr(posterior, "members", (0,)))


def test_without_the_mean_there_is_one_pass_less(tokenizer):
    model, split = make_model("llama"), make_split("test", 5, 2, classes=False, readout="letters")
    full = predict(model, wide(model), split, 3, tokenizer=tokenizer, options=PassOptions(stack=False))
    found = predict(model, wide(model), split, 3, tokenizer=tokenizer, options=PassOptions(stack=False), mean=False)
    assert found.mean_log_probs is None
    assert torch.equal(found.log_probs, full.log_probs)


def test_antithetic_draws_come_in_pairs():
    assert diagonal().count(Draws(5, sampling="antithetic")) == 6
    assert Mixture((diagonal(), low_rank())).count(Draws(5, sampling="antithetic")) == 8
    assert diagonal().count(Draws(5, sampling="sobol")) == 5


def test_simplex_draws_come_in_fives():
    three = Mixture((diagonal(), low_rank(), diagonal()))
    for posterior, asked, given in (
        (diagonal(), 8, 10), (diagonal(), 5, 5), (three, 8, 15), (three, 16, 30), (Mixture((three, diagonal())), 1, 30),
        (Mixture((diagonal(), Point(low_rank().mean))), 4, 10), (Point(diagonal().mean), 8, 1),
    ):  # fmt: skip
        assert posterior.count(Draws(asked, sampling="simplex")) == given


@pytest.mark.parametrize("asked", [8, 40])
@pytest.mark.parametrize("tolerance", [None, 0.01])
@pytest.mark.parametrize("family", ["diagonal", "low-rank", "mixture", "scaled", "nested"])
def test_the_noise_of_all_simplex_draws_that_are_used_sums_to_zero(family, tolerance, asked):
    made = FAMILIES["mixture"]()
    posterior = Mixture((made, low_rank(), diagonal())) if family == "nested" else FAMILIES[family]()
    points = {id(p): vector(p.mean) for p in members(posterior)}
    draws = Draws(posterior.count(Draws(asked, sampling="simplex")), 7, "simplex", tolerance)
    for numbers in rounds(posterior, draws):
        used = {}
        for k in range(numbers.stop):
            used.setdefault(id(member_of(posterior, k)), []).append(vector(posterior.draw(k, 7, "simplex")))
        assert used.keys() == points.keys()
        for key, drawn in used.items():
            torch.testing.assert_close(torch.stack(drawn).mean(0), points[key], rtol=0, atol=2e-6)  # float32 noise


def members(posterior):
    """The posteriors that a posterior draws from in the end."""
    if isinstance(posterior, Scaled):
        return members(posterior.posterior)
    return [m for one in posterior.members for m in members(one)] if isinstance(posterior, Mixture) else [posterior]


def member_of(posterior, index):
    """The one that a draw comes from."""
    if isinstance(posterior, Scaled):
        return member_of(posterior.posterior, index)
    if not isinstance(posterior, Mixture):
        return posterior
    inner, member = divmod(index, len(posterior.members))
    return member_of(posterior.members[member], inner)


def test_exported_simplex_draws_come_in_fives(tmp_path):
    posterior = gaussian(make_model())
    assert len(export_draws(posterior, tmp_path / "draws", Draws(8, sampling="simplex"))) == 10


def test_rounds_grow_by_half_and_end_at_the_largest_number():
    parts = rounds(diagonal(), Draws(30, tolerance=0.01))
    assert [r.stop for r in parts] == [4, 6, 9, 13, 19, 28, 30]
    assert [r.start for r in parts] == [0, *(r.stop for r in parts[:-1])]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tolerance": 0.0}, "tolerance must be finite and positive"),
        ({"tolerance": math.nan}, "tolerance must be finite and positive"),
        ({"minimum": 1}, "minimum must be at least 2"),
        ({"sampling": "latin"}, "sampling must be one of independent, antithetic, simplex, sobol"),
        ({"count": -1}, "draws must be at least 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Draws(**settings)


FORMER = {"seed": 3, "sampling": "simplex", "tolerance": 0.01, "fewest_draws": 6}
NOW = Draws(8, 3, "simplex", 0.01, 6)


@former_keywords(
    seed="draws.seed", sampling="draws.sampling", tolerance="draws.tolerance", fewest_draws="draws.minimum"
)
def asked(text, draws=10, *, flag=False):
    return text, Draws.of(draws), flag


def test_former_keywords_are_fields_of_the_draws_and_a_warning_says_so():
    said = r"asked: seed=, sampling=, tolerance=, fewest_draws= will go .* write draws=bl.Draws\(count=8, seed=3, "
    with pytest.warns(DeprecationWarning, match=said):
        assert asked("a", 8, flag=True, **FORMER) == ("a", NOW, True)
    with pytest.warns(DeprecationWarning, match=said):
        assert asked("a", draws=8, **FORMER) == ("a", NOW, False)
    with pytest.warns(DeprecationWarning, match=r"asked: seed= will go .* write draws=bl.Draws\(count=10, seed=3\)"):
        assert asked("a", seed=3) == ("a", Draws(10, 3), False)


def test_former_keywords_beside_draws_are_refused():
    with pytest.raises(InputError, match=r"seed: a field of draws=Draws\(…\); give it there alone"):
        asked("a", Draws(8), seed=3)


@pytest.mark.parametrize(
    ("name", "required"),
    [
        ("predict", 3),
        ("generate", 3),
        ("generate_each", 3),
        ("predict_rewards", 3),
        ("export_draws", 3),
        ("distill", 4),
    ],
)
def test_public_functions_still_take_former_keywords(name, required):
    said = "sampling must be one of"  # the draws check themselves before anything else is looked at
    with pytest.warns(DeprecationWarning, match=name) as warned, pytest.raises(InputError, match=said):
        getattr(bl, name)(*[1] * required, sampling="latin")
    assert [w.filename for w in warned] == [__file__]


@pytest.mark.parametrize("name", ["predict", "predict_rewards"])
def test_the_former_keywords_of_passes_are_still_taken(name):
    said = r"options=bl.PassOptions\(stack=False\)"
    with pytest.warns(DeprecationWarning, match=said) as warned, pytest.raises(TypeError):
        getattr(bl, name)(None, None, None, stack=False)
    assert [w.filename for w in warned] == [__file__]
