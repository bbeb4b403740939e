"""Uncertainties against closed forms, and the identities that they obey."""

import math

import pytest
import torch

from bayeslora.errors import InputError
from bayeslora.metrics.uncertainty import (
    average,
    between_within,
    disagreement,
    entropy,
    expected_entropy,
    monte_carlo_error,
    mutual_information,
)

LN2 = math.log(2)


def logs(*probs):
    return torch.tensor(probs, dtype=torch.float64).log()


def random_draws(draws, rows=50, choices=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(draws, rows, choices, generator=generator, dtype=dtype).mul(2).log_softmax(-1)


def with_missing_choice(log_probs):
    """Put a choice that no example has between the second and the third."""
    gap = torch.full_like(log_probs[..., :1], -math.inf)
    return torch.cat([log_probs[..., :2], gap, log_probs[..., 2:]], -1)


CERTAIN_AND_OPPOSED = logs([[1.0, 0.0]], [[0.0, 1.0]])


def test_average_is_the_mean_of_the_probabilities():
    mixed = average(logs([[0.2, 0.8]], [[0.6, 0.4]]))
    torch.testing.assert_close(mixed.exp(), torch.tensor([[0.4, 0.6]], dtype=torch.float64))


def test_average_keeps_the_type_of_the_draws():
    assert average(random_draws(3, dtype=torch.float32)).dtype == torch.float32


def test_average_of_one_draw_is_that_draw():
    draws = random_draws(1)
    assert torch.equal(average(draws), draws[0])


def test_average_needs_a_draw():
    with pytest.raises(InputError, match="at least one draw"):
        average(torch.zeros(0, 3, 2))


def test_entropy_of_the_uniform_distribution_is_log_of_the_number_of_choices():
    for choices in (2, 3, 7):
        log_p = torch.full((1, choices), -math.log(choices), dtype=torch.float64)
        assert entropy(log_p).item() == pytest.approx(math.log(choices), abs=1e-14)


def test_entropy_of_certainty_is_zero():
    assert entropy(logs([1.0, 0.0, 0.0])).item() == 0


def test_entropy_of_a_quarter_and_three_quarters_by_hand():
    assert entropy(logs([0.25, 0.75])).item() == pytest.approx(2 * LN2 - 0.75 * math.log(3), abs=1e-14)


def test_two_certain_members_that_disagree_carry_ln_2_of_information_and_no_noise():
    assert mutual_information(CERTAIN_AND_OPPOSED).item() == pytest.approx(LN2, abs=1e-14)
    assert expected_entropy(CERTAIN_AND_OPPOSED).item() == 0
    assert entropy(average(CERTAIN_AND_OPPOSED)).item() == pytest.approx(LN2, abs=1e-14)


def test_identical_draws_have_exactly_no_mutual_information():
    draws = random_draws(1).expand(7, -1, -1)
    assert torch.equal(mutual_information(draws), torch.zeros(50, dtype=torch.float64))


def test_mutual_information_of_nearby_draws_is_half_the_fisher_distance():
    # For p ± d the second-order expansion of H(p) - (H(p + d) + H(p - d)) / 2 is sum(d² / p) / 2.
    p, d = torch.tensor([[0.3, 0.7]], dtype=torch.float64), torch.tensor([[1e-3, -1e-3]], dtype=torch.float64)
    information = mutual_information(torch.stack([p + d, p - d]).log())
    torch.testing.assert_close(information, (d**2 / p).sum(-1) / 2, rtol=1e-4, atol=0)


def test_total_uncertainty_is_expected_entropy_plus_mutual_information():
    draws = random_draws(6)
    torch.testing.assert_close(expected_entropy(draws) + mutual_information(draws), entropy(average(draws)))


def test_mutual_information_lies_between_zero_and_log_of_draws_and_choices():
    draws = random_draws(3).mul(50).log_softmax(-1)
    information = mutual_information(draws)
    assert information.min() >= 0
    assert information.max() <= math.log(3) + 1e-12


def test_float32_draws_give_the_float64_mutual_information_to_float32_precision():
    draws = random_draws(5, dtype=torch.float32)
    torch.testing.assert_close(
        mutual_information(draws).double(), mutual_information(draws.double()), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("measure", [expected_entropy, mutual_information, disagreement])
def test_the_order_of_draws_and_of_choices_does_not_matter(measure):
    draws = random_draws(5)
    torch.testing.assert_close(measure(draws.flip(0)), measure(draws), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(measure(draws.flip(2)), measure(draws), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("measure", [expected_entropy, mutual_information, disagreement])
def test_permuting_the_examples_permutes_the_result(measure):
    draws, order = random_draws(5), torch.randperm(50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(measure(draws[:, order]), measure(draws)[order], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("measure", [expected_entropy, mutual_information, disagreement])
def test_a_choice_that_no_example_has_changes_nothing(measure):
    draws = random_draws(5)
    torch.testing.assert_close(measure(with_missing_choice(draws)), measure(draws), rtol=1e-12, atol=1e-14)


def test_disagreement_counts_draws_whose_answer_is_not_that_of_the_average():
    draws = logs([[0.9, 0.1]], [[0.8, 0.2]], [[0.4, 0.6]])
    assert disagreement(draws).item() == pytest.approx(1 / 3, abs=1e-15)


def test_disagreement_follows_the_average_and_not_the_majority():
    draws = logs([[0.99, 0.01]], [[0.45, 0.55]], [[0.45, 0.55]])
    assert disagreement(draws).item() == pytest.approx(2 / 3, abs=1e-15)


def test_all_information_is_between_members_that_are_certain_and_disagree():
    between, within = between_within(CERTAIN_AND_OPPOSED, [0, 1])
    assert between.item() == pytest.approx(LN2, abs=1e-14)
    assert within.item() == 0


def test_all_information_is_within_one_member():
    between, within = between_within(CERTAIN_AND_OPPOSED, [3, 3])
    assert between.item() == 0
    assert within.item() == pytest.approx(LN2, abs=1e-14)


def test_between_and_within_sum_to_the_mutual_information_for_equally_many_draws():
    draws = random_draws(6)
    between, within = between_within(draws, [0, 1, 2, 0, 1, 2])
    torch.testing.assert_close(between + within, mutual_information(draws), rtol=1e-12, atol=1e-14)


def test_members_weigh_the_same_however_many_draws_they_have():
    draws = logs([[1.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]])
    between, within = between_within(draws, [0, 0, 0, 1])
    assert between.item() == pytest.approx(LN2, abs=1e-14)
    assert within.item() == 0


def test_between_and_within_do_not_depend_on_what_the_members_are_called():
    draws = random_draws(4)
    for first, second in zip(between_within(draws, [0, 0, 1, 1]), between_within(draws, [9, 9, 4, 4]), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)


def test_between_within_needs_a_member_for_every_draw():
    with pytest.raises(InputError, match="2 entries for 3 draws"):
        between_within(random_draws(3), [0, 1])


def test_the_monte_carlo_error_is_the_standard_error_of_the_most_uncertain_choice():
    probs = random_draws(6).exp()
    wanted = (probs.std(0) / math.sqrt(6)).amax(-1)
    torch.testing.assert_close(monte_carlo_error(probs.log()), wanted)


def test_the_monte_carlo_error_of_pairs_is_that_of_their_averages():
    probs = random_draws(6).exp()
    pairs = (probs[0::2] + probs[1::2]) / 2
    torch.testing.assert_close(monte_carlo_error(probs.log(), paired=True), (pairs.std(0) / math.sqrt(3)).amax(-1))
    mirrored = torch.stack([probs[0], 0.5 - probs[0]]).abs()
    mirrored = torch.cat([mirrored, mirrored])[:, :1]
    assert float(monte_carlo_error(mirrored.log(), paired=True)) < 1e-7


def test_the_monte_carlo_error_of_a_mixture_has_no_part_between_its_members():
    one, other = logs([0.9, 0.1]), logs([0.2, 0.8])
    draws = torch.stack([one, other, one, other])
    assert float(monte_carlo_error(draws, (0, 1, 0, 1))) == 0
    assert float(monte_carlo_error(draws)) == pytest.approx(0.7 / math.sqrt(12))
    assert float(monte_carlo_error(draws[:2], (0, 1))) == pytest.approx(0.35)  # a single draw of each: an upper bound


def test_the_monte_carlo_error_counts_the_draws_that_were_taken():
    draws = random_draws(5)
    cut = draws.clone()
    cut[3:, 7] = -math.inf
    torch.testing.assert_close(monte_carlo_error(cut)[7], monte_carlo_error(draws[:3])[7])
    torch.testing.assert_close(monte_carlo_error(cut)[8], monte_carlo_error(draws)[8])
    assert bool(monte_carlo_error(draws[:1]).isinf().all())


def test_nine_in_ten_averages_lie_within_the_errors_they_state():
    # 4,000 examples, 16 draws each: a t-statistic with 15 degrees of freedom is within 1.75 in 90 % of cases
    rng = torch.Generator().manual_seed(0)
    first = 0.5 + 0.1 * torch.randn(16, 4000, generator=rng, dtype=torch.float64).clamp(-4, 4)
    draws = torch.stack([first, 1 - first], -1).log()
    inside = ((first.mean(0) - 0.5).abs() <= 1.753 * monte_carlo_error(draws)).double().mean()
    assert abs(float(inside) - 0.9) < 5 * math.sqrt(0.09 / 4000)
