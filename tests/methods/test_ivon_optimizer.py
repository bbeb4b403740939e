"""IVON's optimiser against its equations (arXiv 2402.17641, algorithm 1) and against exact posteriors."""

import copy
import math

import pytest
import torch
from torch import nn

from bayeslora.errors import InputError
from bayeslora.methods.ivon.optimizer import IvonOptimizer
from bayeslora.methods.ivon.sampler import diagnostics

SETTINGS = {"lr": 0.1, "ess": 50.0, "hess_init": 0.7, "betas": (0.9, 0.95), "weight_decay": 0.2}


def parameter(*values, dtype=torch.float32):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def by_hand(m, g, h, t, noise, grad, *, lr, ess, hess_init, betas, weight_decay, clip=math.inf, rescale=False):
    """One step of algorithm 1 in double precision, written as in the paper."""
    b1, b2, delta = *betas, weight_decay
    g = b1 * g + (1 - b1) * grad
    f = ess * (h + delta) * noise * grad
    h = b2 * h + (1 - b2) * f + 0.5 * (1 - b2) ** 2 * (h - f) ** 2 / (h + delta)
    step = (g / (1 - b1**t) + delta * m) / (h + delta)
    rate = lr * (hess_init + delta) if rescale else lr
    return m - rate * step.clamp(-clip, clip), g, h


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("clip", [math.inf, 0.05])
def test_three_steps_follow_the_equations(clip, rescale):
    p = parameter(0.5, -1.0, 2.0)
    optimizer = IvonOptimizer([p], **SETTINGS, clip_radius=clip, rescale_lr=rescale)
    m, g, h = p.detach().double(), torch.zeros(3).double(), torch.full((3,), 0.7).double()
    scale = torch.tensor([1.0, 2.0, -0.5])
    for t in (1, 2, 3):
        with optimizer.sampled():
            noise = (p.detach() - m).double()
            torch.testing.assert_close(noise.float(), optimizer.noise(p), rtol=1e-5, atol=1e-6)
            (scale * p**3).sum().backward()
        m, g, h = by_hand(
            m, g, h, t, optimizer.noise(p).double(), p.grad.double(), clip=clip, rescale=rescale, **SETTINGS
        )
        optimizer.step()
        p.grad = None
        torch.testing.assert_close(p.detach().double(), m, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(optimizer.state[p]["hess"].double(), h, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(optimizer.state[p]["avg_grad"].double(), g, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(optimizer.variance(p).double(), 1 / (50 * (h + 0.2)), rtol=1e-5, atol=0)


def test_the_noise_has_the_posterior_deviation():
    # mean and variance of 200,000 normal numbers: 5 deviations of the estimates, false alarms 1 in a million
    p = nn.Parameter(torch.zeros(200_000))
    optimizer = IvonOptimizer([p], **SETTINGS)
    with optimizer.sampled():
        z = p.detach() * math.sqrt(50 * 0.9)
    assert abs(float(z.mean())) < 5 / math.sqrt(len(z))
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / len(z))


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e8, 1e15])
def test_h_plus_delta_stays_positive_for_any_gradient(size):
    p = nn.Parameter(torch.zeros(1000))
    optimizer = IvonOptimizer([p], lr=0.0, ess=1e4, hess_init=1e-3, betas=(0.9, 0.5))
    rng = torch.Generator().manual_seed(0)
    for _ in range(30):
        optimizer.draw()
        p.grad = size * torch.randn(1000, generator=rng)
        before = optimizer.state[p]["hess"].clone()
        optimizer.step()
        assert bool((optimizer.state[p]["hess"] >= before / 2 * (1 - 1e-5)).all())
        if not bool(torch.isfinite(optimizer.state[p]["hess"]).all()):
            break


def test_price_clipping_bounds_the_hessian_estimate():
    p = nn.Parameter(torch.zeros(1000))
    optimizer = IvonOptimizer([p], lr=0.0, ess=100, hess_init=1.0, betas=(0.9, 0.9), price_clip=3.0)
    optimizer.draw()
    p.grad = 1e6 * torch.ones(1000)
    optimizer.step()
    low, high = (1 - 0.1 * x + 0.005 * x**2 for x in (4.0, -2.0))  # f = ∓3, h = 1, d = f − 1
    hess = optimizer.state[p]["hess"]
    torch.testing.assert_close(hess.unique(), torch.tensor([low, high]), rtol=1e-5, atol=0)


def regression(rows=200, width=5, seed=0):
    """Linear regression with unit noise: the posterior under a prior of precision 1 has precision XᵀX + I."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=rng) * torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0])
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]) + torch.randn(rows, generator=rng)
    precision = x.T @ x + torch.eye(width)
    return x, y, torch.linalg.solve(precision, x.T @ y), precision


@pytest.mark.slow
def test_conjugate_regression_gives_the_exact_mean_field_posterior():
    # The best diagonal Gaussian has the exact mean and the precision diag(XᵀX + I). h averages about 2/(1−β₂) = 4000
    # noisy values of f; for a normal draw f/h has deviation √2, more with the other coordinates' noise: 3 % is left.
    # The mean is shaken by about √(η/2) = 0.1 of its own deviation.
    x, y, mean, precision = regression()
    p = nn.Parameter(torch.zeros(5))
    optimizer = IvonOptimizer([p], lr=0.02, ess=200, hess_init=1.0, betas=(0.9, 0.9995), weight_decay=1 / 200)
    for _ in range(8000):
        with optimizer.sampled():
            p.grad = None
            (0.5 * (y - x @ p).square().mean()).backward()
        optimizer.step()
    exact = 1 / precision.diagonal()
    assert bool(((p.detach() - mean).abs() < 0.3 * exact.sqrt()).all())
    torch.testing.assert_close(optimizer.variance(p), exact, rtol=0.1, atol=0)


def test_micro_batches_give_the_step_of_the_joint_batch():
    x, y, _, _ = regression(rows=24)
    found = []
    for parts in (1, 4):
        p = nn.Parameter(torch.full((5,), 0.3))
        optimizer = IvonOptimizer([p], **SETTINGS)
        for _ in range(3):
            optimizer.zero_grad()
            with optimizer.sampled():
                for rows in torch.arange(24).chunk(parts):
                    ((y[rows] - x[rows] @ p).square().mean() / parts).backward()
            optimizer.step()
        found.append((p.detach(), optimizer.state[p]["hess"]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_several_draws_of_a_step_are_averaged_each_with_its_own_noise(clip):
    p = parameter(0.5, -1.0)
    optimizer = IvonOptimizer([p], **SETTINGS)
    product, total, seen = torch.zeros(2), torch.zeros(2), []
    for _ in range(3):
        with optimizer.sampled():
            (p**4).sum().div(3).backward()
            at = p.detach().clone()
        gradient = 4 * at**3 / 3
        product, total = product + optimizer.noise(p) * gradient, total + gradient
        seen.append(at.tolist())
    assert seen[0] != seen[1] != seen[2]
    factor = 1.0 if clip is None else clip / float(total.norm())
    if clip is not None:
        torch.nn.utils.clip_grad_norm_([p], clip)
    optimizer.step()
    f = 50 * 0.9 * product * factor
    hess = 0.95 * 0.7 + 0.05 * f + 0.5 * 0.05**2 * (0.7 - f) ** 2 / 0.9
    torch.testing.assert_close(optimizer.state[p]["hess"], hess, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(optimizer.state[p]["avg_grad"], 0.1 * total * factor, rtol=1e-4, atol=1e-7)


def test_scaled_gradients_of_automatic_mixed_precision_are_unscaled_before_they_count():
    found = []
    for scale in (1.0, 1024.0):
        p = parameter(0.5, -1.0)
        optimizer = IvonOptimizer([p], **SETTINGS)
        for _ in range(2):
            with optimizer.sampled():
                ((p**4).sum() * scale / 2).backward()
        p.grad /= scale  # what GradScaler.unscale_ does
        optimizer.step()
        found.append(optimizer.state[p]["hess"])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_the_parameters_are_the_means_again_after_an_exception():
    p = parameter(0.5, -1.0)
    optimizer = IvonOptimizer([p], **SETTINGS)
    before = p.detach().clone()

    def stopped():
        with optimizer.sampled():
            assert not torch.equal(p, before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert torch.equal(p, before)


def test_a_parameter_without_gradient_is_skipped():
    p, unused = parameter(0.5), parameter(1.0)
    optimizer = IvonOptimizer([p, unused], **SETTINGS)
    with optimizer.sampled():
        p.square().sum().backward()
    optimizer.step()
    assert unused.item() == 1.0
    assert optimizer.state[unused]["step"] == 0
    assert optimizer.state[unused]["hess"].item() == pytest.approx(0.7)
    assert optimizer.state[p]["step"] == 1


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    def steps(p, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            with optimizer.sampled():
                (p**4).sum().backward()
            optimizer.step()

    p = parameter(0.5, -1.0)
    optimizer = IvonOptimizer([p], **SETTINGS, prior="empirical", seed=5)
    steps(p, optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = nn.Parameter(p.detach().clone())
    other = IvonOptimizer([again], **SETTINGS, prior="empirical", seed=5)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(p, optimizer, 3)
    steps(again, other, 3)
    assert torch.equal(p, again)
    assert torch.equal(optimizer.state[p]["hess"], other.state[again]["hess"])
    assert optimizer.state[p]["delta"] == other.state[again]["delta"]


def test_parameters_in_bfloat16_keep_float32_means_also_through_a_saved_state():
    p = parameter(1.0, -1.0, dtype=torch.bfloat16)
    optimizer = IvonOptimizer([p], lr=1.0, ess=1e6, hess_init=1.0, clip_radius=1e-4)
    for step in range(20):  # a step of 1e-4 is below bfloat16's resolution of 4e-3 at 1
        with optimizer.sampled():
            (p.float() ** 2).sum().backward()
        optimizer.step()
        p.grad = None
        if step == 9:
            kept = copy.deepcopy(optimizer.state_dict())
            optimizer = IvonOptimizer([p], lr=1.0, ess=1e6, hess_init=1.0, clip_radius=1e-4)
            optimizer.load_state_dict(kept)
    assert all(v.dtype == torch.float32 for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))
    torch.testing.assert_close(optimizer.mean(p), torch.tensor([0.998, -0.998]), rtol=0, atol=2e-5)
    assert torch.equal(p, optimizer.mean(p).bfloat16())


def test_the_empirical_prior_is_where_the_evidence_bound_is_highest():
    # lr = 0 and no gradient signal: m and h stay, and δ must end at 1/(λ·mean(m² + σ²)) of each tensor by itself
    tensors = [parameter(0.5, -1.0, 2.0), parameter(0.01, 0.02)]
    optimizer = IvonOptimizer(
        tensors, lr=0.0, ess=100, hess_init=0.7, betas=(0.9, 1 - 1e-12), weight_decay=0.2, prior="empirical"
    )
    for _ in range(3000):
        optimizer.draw()
        for p in tensors:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p in tensors:
        delta = optimizer.state[p]["delta"]
        second = float((p.detach() ** 2 + 1 / (100 * (0.7 + delta))).mean())
        assert delta == pytest.approx(1 / (100 * second), rel=1e-3)


def test_one_seed_is_one_stream_of_noise():
    def first(seed):
        p = nn.Parameter(torch.zeros(4))
        optimizer = IvonOptimizer([p], **SETTINGS, seed=seed)
        optimizer.draw()
        return optimizer.noise(p)

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"betas": (0.9, -0.1)}, "betas"),
        ({"ess": 0.0}, "ess"),
        ({"ess": math.inf}, "ess"),
        ({"hess_init": 0.0, "weight_decay": 0.0}, "infinite"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"clip_radius": 0.0}, "clip_radius"),
        ({"prior": "flat"}, "prior"),
        ({"prior_mean": "mode"}, "prior_mean"),
    ],
)
def test_settings_without_a_meaning_are_refused(change, word):
    with pytest.raises(InputError, match=word):
        IvonOptimizer([parameter(1.0)], **(SETTINGS | change))


def test_a_gradient_that_was_not_taken_at_a_draw_is_refused():
    p = parameter(1.0)
    optimizer = IvonOptimizer([p], **SETTINGS)
    p.square().sum().backward()
    with pytest.raises(InputError, match="sampled"):
        optimizer.step()


def test_a_closure_is_called_at_a_draw():
    p = parameter(0.5)
    optimizer = IvonOptimizer([p], **SETTINGS)
    seen = []

    def closure():
        seen.append(p.item())
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(seen[0] ** 2)
    assert seen[0] != 0.5
    assert p.item() != 0.5


def flat(steps, **settings):
    """The median σ by σ₀ after so many steps in which the loss does not depend on the parameters."""
    p = nn.Parameter(torch.zeros(500))
    optimizer = IvonOptimizer([p], lr=0.0, ess=21_000.0, betas=(0.9, 0.999), **settings)
    first = optimizer.variance(p).sqrt()
    rng = torch.Generator().manual_seed(0)
    found = {}
    for step in range(1, max(steps) + 1):
        optimizer.draw()
        p.grad = 1e-3 * torch.randn(500, generator=rng)
        optimizer.step()
        if step in steps:
            found[step] = float((optimizer.variance(p).sqrt() / first).median())
    return found


@pytest.mark.slow
def test_where_the_loss_is_flat_the_deviation_stays_with_a_bounded_prior_and_grows_without_one():
    steps = (150, 1500, 6000)
    delta = 1 / (21_000 * 0.04**2)
    bounded = flat(steps, hess_init=0.0, weight_decay=delta, bounded=True)
    assert all(0.95 < ratio <= 1 + 1e-5 for ratio in bounded.values()), bounded
    free = flat(steps, hess_init=delta)  # δ = 0: h ≈ h₀β₂ᵗ
    assert free[6000] > 10 * free[150]


@pytest.mark.parametrize("warmup", [0.0, 50.0])
@pytest.mark.parametrize(("where", "end"), [("start", 2.0), ("zero", 0.0)])
def test_the_prior_pulls_to_its_mean_more_and_more(where, end, warmup):
    p = parameter(2.0)
    optimizer = IvonOptimizer(
        [p], lr=0.1, ess=100.0, hess_init=0.0, weight_decay=1.0, prior_mean=where, prior_warmup=warmup
    )

    def step():
        optimizer.draw()
        p.grad = torch.zeros(1)
        optimizer.step()

    optimizer.draw()
    with torch.no_grad():
        p.add_(0.5)
    step()  # η·δ(m − m₀)/(h+δ) with h = 0
    grown = 1 - math.exp(-1 / warmup) if warmup else 1.0
    assert p.item() == pytest.approx(2.5 - 0.1 * (2.5 - end) * grown, abs=1e-4)
    for _ in range(400):
        step()
    assert p.item() == pytest.approx(end, abs=1e-4)


def test_a_parameters_noise_depends_on_its_number_alone():
    def second(size):
        tensors = [nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(4))]
        optimizer = IvonOptimizer(tensors, **SETTINGS, seed=3)
        optimizer.draw()
        return [optimizer.noise(p) for p in tensors]

    # what stands before it, on the same device or on another, does not matter; and two alike differ
    assert torch.equal(second(3)[1], second(7)[1])
    assert not torch.equal(*second(4))


def test_a_parameter_may_have_its_own_start_of_h_and_its_own_prior():
    p, other = parameter(1.0), parameter(1.0)
    optimizer = IvonOptimizer([p, other], **SETTINGS)
    optimizer.begin(p, hess_init=0.0, weight_decay=2.0)
    assert optimizer.variance(p).item() == pytest.approx(1 / (50 * 2.0))
    assert optimizer.variance(other).item() == pytest.approx(1 / (50 * 0.9))
    with optimizer.sampled():
        (p + other).sum().backward()
    optimizer.step()
    kept = optimizer.state[p]["delta"]
    optimizer.begin(p, hess_init=5.0, weight_decay=5.0)  # too late
    assert optimizer.state[p]["delta"] == kept == 2.0


def test_an_empirical_prior_does_not_pull_the_mean():
    p = parameter(0.5, -1.0)
    optimizer = IvonOptimizer([p], lr=1.0, ess=100.0, hess_init=0.7, weight_decay=1.0, prior="empirical")
    for _ in range(50):
        optimizer.draw()
        p.grad = torch.zeros(2)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.5, -1.0]))


def test_the_decay_of_h_is_not_taken_for_learning():
    p = nn.Parameter(torch.zeros(100))
    optimizer = IvonOptimizer([p], lr=0.0, ess=100.0, hess_init=1.0, betas=(0.9, 0.99))
    for _ in range(100):  # no gradient: h = .99¹⁰⁰ = .37
        optimizer.draw()
        p.grad = torch.zeros(100)
        optimizer.step()
    assert diagnostics(optimizer)["hess_moved"] == 0
    for _ in range(100):  # and a loss of curvature 1: h goes back to it
        optimizer.draw()
        p.grad = optimizer.noise(p).clone()
        optimizer.step()
    assert diagnostics(optimizer)["hess_moved"] > 0.9
