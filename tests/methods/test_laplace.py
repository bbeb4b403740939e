"""Laplace-LoRA against dense matrices and the exact posterior of linear regression."""

import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.linearised import moments_of
from support.tiny import KINDS, make_model, make_task, same_state, state_of
from torch import nn

from bayeslora.errors import InputError
from bayeslora.methods import Laplace
from bayeslora.methods.laplace.ggn import DiagonalCurvature, KroneckerCurvature, accumulated, ggn_root
from bayeslora.methods.laplace.method import log_occam_factor, maximise_marginal_likelihood
from bayeslora.methods.laplace.sketch import Factor
from bayeslora.params import lora_parameters, read
from bayeslora.posteriors import DiagonalGaussian, Draws, KroneckerGaussian, Linearised
from bayeslora.posteriors.linearised import LOGIT_DRAWS, logit_draws
from bayeslora.prediction import predict
from bayeslora.prediction.jacobians import differentiated, linear_sites
from bayeslora.prediction.passes import batched
from bayeslora.prediction.readouts import readout_for

DATA, SIDE, OUT, NOISE = 30, 4, 2, 0.3


def dense_jacobian(model, batches, examples, names):
    """Logits [N C] and their derivatives [N C P], one backward pass at a time; the readout is attached."""
    own = lora_parameters(model)
    for p in own.values():
        p.requires_grad_(True)
    logits, rows = {}, {}
    for order, batch in batches:
        found = model(**batch).logits.float()
        for k, n in enumerate(order):
            logits[n] = found[k].detach()
            rows[n] = [
                torch.cat([g.flatten() for g in torch.autograd.grad(
                    found[k, c], [own[name] for name in names], retain_graph=True, materialize_grads=True
                )]) if found[k, c] > -math.inf else torch.zeros(sum(own[name].numel() for name in names))
                for c in range(found.shape[1])
            ]  # fmt: skip
    most = max(len(v) for v in logits.values())
    full = torch.full((examples, most), -math.inf)
    jacobian = torch.zeros(examples, most, len(rows[0][0]))
    for n in range(examples):
        full[n, : len(logits[n])] = logits[n]
        jacobian[n, : len(rows[n])] = torch.stack(rows[n])
    return full, jacobian


MODELS = {
    **{
        name: (KINDS[name].model, KINDS[name].readout, {})
        for name in ("llama-letters", "llama-likelihood", "gpt2", "bert")
    },
    "separate choices": ("llama", "likelihood", {"alone": True}),
    "head of the language model": ("llama", "likelihood", {"target_modules": ["v_proj", "lm_head"]}),
}


def prepared(name, tokenizer, budget=60):
    """A model, its readout, some rows and their batches."""
    kind, readout_name, options = MODELS[name]
    alone = options.get("alone", False)
    model = make_model(kind, **{k: v for k, v in options.items() if k != "alone"})
    if alone:  # an attention for which branches after one prompt are not tried
        model.get_base_model().config._attn_implementation = "flex_attention"
    rows = make_task(classes=kind == "bert", readout=readout_name).train.take(range(9))
    readout = readout_for(model, rows, tokenizer)
    if alone:
        assert not readout.shared
        model.get_base_model().config._attn_implementation = "eager"
    batches = batched(model.eval(), readout, readout.encode(rows)[0], budget)
    return model, readout, rows, batches


@pytest.mark.parametrize("name", MODELS)
def test_jacobians_are_those_of_one_backward_pass_for_each_logit(name, tokenizer):
    model, readout, rows, batches = prepared(name, tokenizer)
    sites = linear_sites(model)
    before = state_of(model)
    with readout.attached(model), differentiated(model, sites) as passed:
        passes = [(order, passed(batch)) for order, batch in batches]
        pieces = [(order, one.logits, one.along()) for order, one in passes]
    assert same_state(model, before)
    with readout.attached(model):
        logits, jacobian = dense_jacobian(model, batches, len(rows), [s.name for s in sites])
    assert len(pieces) > 1
    for order, values, found in pieces:
        classes = values.shape[1]
        torch.testing.assert_close(values, logits[order, :classes])
        own = torch.cat([found.jacobian(s).flatten(2) for s in sites], 2).transpose(0, 1)
        torch.testing.assert_close(own, jacobian[order, :classes], rtol=1e-4, atol=1e-6)


def hessian_root(logits):
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None]


def test_the_root_of_the_hessian_is_one_also_where_a_choice_is_missing():
    logits = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.0, -math.inf]])
    root = ggn_root(logits)
    torch.testing.assert_close(root @ root.mT, hessian_root(logits))


@pytest.mark.parametrize("name", ["llama-likelihood", "bert"])
def test_the_diagonal_is_that_of_the_dense_gauss_newton_matrix(name, tokenizer):
    model, readout, rows, batches = prepared(name, tokenizer)
    curvature = DiagonalCurvature(linear_sites(model))
    with readout.attached(model):
        log_likelihood = accumulated(model, curvature, batches, rows.labels)
        logits, jacobian = dense_jacobian(model, batches, len(rows), [s.name for s in curvature.sites])
    ggn = torch.einsum("ncp,ncd,ndq->pq", jacobian, hessian_root(logits), jacobian)
    found = torch.cat([h.flatten() for h in curvature.sums.values()])
    torch.testing.assert_close(found, ggn.diagonal(), rtol=1e-3, atol=1e-6)
    assert log_likelihood == pytest.approx(float(logits.log_softmax(-1)[range(len(rows)), rows.labels].sum()), rel=1e-5)


@pytest.mark.parametrize("tokens", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_the_curvature_does_not_depend_on_the_batches(structure, tokens, tokenizer):
    found = []
    for budget in (30, 4000):
        model, readout, rows, batches = prepared("llama-likelihood", tokenizer, budget)
        sites = linear_sites(model)
        kron = KroneckerCurvature(sites, 4, tokens)
        curvature = DiagonalCurvature(sites) if structure == "diag" else kron
        with readout.attached(model):
            accumulated(model, curvature, batches, rows.labels)
        found.append(curvature.spectra())
    for name in found[0]:
        for one, other in zip(found[0][name], found[1][name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("budget", [30, 4000])
def test_the_query_of_a_first_token_which_sees_itself_alone_is_not_counted(budget, tokenizer):
    model, readout, rows, batches = prepared("llama-likelihood", tokenizer, budget)
    sites = {site.name.split("model.layers.")[1]: site for site in linear_sites(model)}
    query, value = (sites[f"0.self_attn.{name}.lora_A.weight"] for name in ("q_proj", "v_proj"))
    curvature = KroneckerCurvature([query, value], 4)
    with readout.attached(model):
        accumulated(model, curvature, batches, rows.labels)
    counts = [int(curvature.count[site.module]) for site in (query, value)]
    assert counts == [counts[1] - len(rows), sum(readout.length(row) for row in readout.encode(rows)[0])]


def test_on_one_example_with_one_token_k_fac_is_the_whole_matrix(tokenizer):
    model, readout, rows, _ = prepared("bert", tokenizer)
    rows = rows.take([0])
    batches = batched(model, readout, readout.encode(rows)[0], 60)
    sites = linear_sites(model, lambda name: "classifier" in name)  # the pooled vector is one token
    curvature = KroneckerCurvature(sites, 40)
    with readout.attached(model):
        accumulated(model, curvature, batches, rows.labels)
        logits, jacobian = dense_jacobian(model, batches, 1, [s.name for s in sites])
    p, offset = curvature.posterior(read(model), 0.5, None), 0
    assert any(s.bias for s in sites)
    for site in sites:
        size = p.mean[site.name].numel()
        own = jacobian[:, :, offset : offset + size]
        offset += size
        block = torch.einsum("ncp,ncd,ndq->pq", own, hessian_root(logits), own) + 0.5 * torch.eye(size)
        identity = torch.eye(size).view(size, *p.mean[site.name].reshape(len(p.mean[site.name]), -1).shape)
        found = p.multiply(site.name, identity).reshape(size, size)
        torch.testing.assert_close(found @ block, torch.eye(size), rtol=0, atol=1e-3)


class Regression(nn.Module):
    """Two outputs, linear in the input, in the dress of a model with logits."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(SIDE, OUT, bias=False)
        self.config = SimpleNamespace(to_dict=dict)

    def forward(self, input_ids, x):
        return SimpleNamespace(logits=self.lin(x[input_ids[:, 0]]))


@pytest.fixture
def regression():
    """A model that is linear in B, its data, features [N R], targets less the base's answer, and the prior's λ."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = get_peft_model(Regression(), LoraConfig(r=3, lora_alpha=6, target_modules=["lin"])).double()
        x, y = torch.randn(DATA, SIDE, dtype=torch.float64), torch.randn(DATA, OUT, dtype=torch.float64)
    a = model.base_model.model.lin.lora_A["default"].weight.detach()
    features = 2.0 * x @ a.T
    residual = y - x @ model.base_model.model.lin.base_layer.weight.detach().T
    batches = [([*part], {"input_ids": torch.tensor(part)[:, None], "x": x})
               for part in (range(12), range(12, DATA))]  # fmt: skip
    return model, batches, features, residual, 1.7


@pytest.mark.parametrize("tokens", ["expand", "reduce"])
def test_laplace_is_the_exact_posterior_of_linear_regression(regression, tokens):
    model, batches, features, residual, precision = regression
    (site,) = linear_sites(model, lambda name: "lora_B" in name)
    gram = features.T @ features / NOISE**2 + precision * torch.eye(3)
    exact = torch.linalg.solve(gram, features.T @ residual / NOISE**2).T  # the mode of B
    lora_parameters(model)[site.name].data.copy_(exact)
    curvature = KroneckerCurvature([site], 8, tokens)
    root = lambda logits, rows: (torch.eye(OUT) / NOISE).expand(len(logits), -1, -1)  # noqa: E731
    accumulated(model, curvature, batches, torch.zeros(DATA, dtype=torch.long), root)
    p = curvature.posterior(read(model), precision, None)
    covariance = torch.kron(torch.eye(OUT, dtype=torch.float64), torch.linalg.inv(gram).contiguous())
    identity = torch.eye(OUT * 3).view(-1, OUT, 3)
    torch.testing.assert_close(p.multiply(site.name, identity).flatten(1), covariance.float(), rtol=1e-4, atol=1e-7)

    # and its evidence is the Gaussian density of the targets
    error = residual - features @ exact.T
    log_likelihood = float((-0.5 * (error / NOISE).square() - math.log(NOISE * math.sqrt(2 * math.pi))).sum())
    found = log_likelihood + log_occam_factor(curvature.spectra(), read(model), precision)
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros(DATA, dtype=torch.float64),
        NOISE**2 * torch.eye(DATA, dtype=torch.float64) + features @ features.T / precision,
    )
    assert found == pytest.approx(float(marginal.log_prob(residual.T.contiguous()).sum()), rel=1e-5)


def spectra_of(values):
    return {"w": (values.double(), torch.ones(values.shape, dtype=torch.float64))}


def test_the_evidence_is_largest_where_its_derivative_is_zero():
    h, mean = torch.tensor([0.1, 3.0, 40.0, 0.0]), {"w": torch.tensor([0.5, -1.0, 0.2, 0.1])}
    best = maximise_marginal_likelihood(spectra_of(h), mean)
    # d/dλ = ½ (P/λ − |θ|² − Σ 1/(h+λ)) = 0
    slope = 4 / best - float(mean["w"].square().sum()) - float((1 / (h + best)).sum())
    assert abs(slope) < 1e-3
    at = [log_occam_factor(spectra_of(h), mean, best * factor) for factor in (0.5, 1.0, 2.0)]
    assert at[1] > at[0]
    assert at[1] > at[2]


def test_an_evidence_without_a_maximum_is_refused():
    with pytest.raises(InputError, match="the loss has no curvature"):
        maximise_marginal_likelihood(spectra_of(torch.zeros(3)), {"w": torch.ones(3)})
    with pytest.raises(InputError, match="every parameter is zero"):
        maximise_marginal_likelihood(spectra_of(torch.ones(3)), {"w": torch.zeros(3)})


def test_a_sketch_of_low_rank_is_exact_in_any_order_and_small():
    rng = torch.Generator().manual_seed(0)
    vectors = torch.randn(500, 5, generator=rng) @ torch.randn(5, 300, generator=rng)
    found = []
    for parts in ([vectors], vectors.flip(0).split(37)):
        factor = Factor(300, 20, "x", torch.device("cpu"))
        for part in parts:
            factor.add(part)
        assert factor.sketch.shape == (300, 20)
        found.append(factor.eigen(10))
    exact = torch.linalg.eigvalsh((vectors.T @ vectors).double()).flip(0)[:5].float()
    for values, basis in found:
        torch.testing.assert_close(values[:5], exact, rtol=1e-3, atol=0)
        assert float(values[5:].abs().max()) < 1e-3 * float(exact[0])
        torch.testing.assert_close(basis.T @ basis, torch.eye(10), rtol=0, atol=1e-4)
        top = basis[:, :5]
        torch.testing.assert_close(
            top @ values[:5].diag() @ top.T, vectors.T @ vectors, rtol=0, atol=float(exact[0]) * 1e-4
        )


def test_what_a_sketch_leaves_out_keeps_the_trace():
    vectors = torch.randn(4000, 100, generator=torch.Generator().manual_seed(1))
    factor = Factor(100, 20, "x", torch.device("cpu"))
    factor.add(vectors)
    values, basis = factor.eigen(5, 0.5)
    assert basis.shape == (100, 5)
    assert float(values[:-1].sum() + 95 * values[-1]) == pytest.approx(0.5 * float(vectors.square().sum()), rel=1e-5)


@pytest.fixture(params=["kron", "diag"])
def fitted(request, tokenizer):
    model, readout, rows, batches = prepared("llama-likelihood", tokenizer)
    task = make_task(readout="likelihood")
    posterior = Laplace(request.param, prior=30.0).fit(model, task, tokenizer=tokenizer)
    assert isinstance(posterior, Linearised)
    return model, readout, (rows, batches), posterior


def dense(p, names):
    blocks = []
    for name in names:
        size = p.mean[name].numel()
        if isinstance(p, DiagonalGaussian):
            blocks.append(p.variance[name].flatten().diag())
        else:
            blocks.append(p.multiply(name, torch.eye(size).view(size, *p.mean[name].shape)).flatten(1))
    return torch.block_diag(*blocks)


def test_the_logits_covariance_is_the_jacobian_times_the_weights(fitted):
    model, readout, (rows, batches), posterior = fitted
    names = [s.name for s in linear_sites(model)]
    with readout.attached(model):
        logits, covariances = moments_of(model, [posterior.posterior], batches, len(rows))
        exact, jacobian = dense_jacobian(model, batches, len(rows), names)
    torch.testing.assert_close(logits, exact)
    expected = torch.einsum("ncp,pq,ndq->ncd", jacobian, dense(posterior.posterior, names), jacobian)
    torch.testing.assert_close(covariances[0], expected, rtol=1e-3, atol=1e-6)


def test_linearised_predictions_average_draws_of_the_logits(fitted, tokenizer):
    model, readout, (rows, batches), posterior = fitted
    found = predict(model, posterior, rows, draws=Draws(7, seed=3), tokenizer=tokenizer)
    with readout.attached(model):
        logits, covariances = moments_of(model, [posterior.posterior], batches, len(rows))
    torch.testing.assert_close(found.mean_log_probs, logits.log_softmax(-1), rtol=1e-4, atol=1e-5)
    contents = [row.content for row in readout.encode(rows)[0]]
    expected = logit_draws(logits, covariances[0], contents, LOGIT_DRAWS, 3)  # they cost next to nothing
    expected = expected.log_softmax(-1)
    torch.testing.assert_close(found.log_probs, expected, rtol=1e-3, atol=1e-4)
    assert found.mutual_information.max() > 0
    with torch.inference_mode():
        again = predict(model, posterior, rows, draws=Draws(7, seed=3), tokenizer=tokenizer)
    assert torch.equal(again.log_probs, found.log_probs)


def test_draws_of_logits_have_their_moments():
    root = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.3, 0.0], [-0.2, 0.1, 0.0]])  # a singular covariance
    logits, covariance = torch.tensor([[1.0, 0.0, -1.0]]), (root @ root.T)[None]
    draws = logit_draws(logits, covariance, [0], 20_000, 0)[:, 0]
    # false alarm: 12 comparisons at five standard errors, 1e-5
    torch.testing.assert_close(draws.mean(0), logits[0], rtol=0, atol=5 / math.sqrt(20_000))
    torch.testing.assert_close(torch.cov(draws.T), covariance[0], rtol=0, atol=5 * math.sqrt(2 / 20_000))


def test_little_curvature_and_a_weak_prior_mean_more_uncertainty(tokenizer):
    model, _, rows, _ = prepared("llama-likelihood", tokenizer)
    task = make_task(readout="likelihood")
    information = []
    for precision in (1.0, 100.0, 1e8):
        posterior = Laplace(prior=precision).fit(model, task, tokenizer=tokenizer)
        information.append(
            float(predict(model, posterior, rows, draws=20, tokenizer=tokenizer).mutual_information.mean())
        )
    assert information[0] > information[1] > information[2]
    assert information[2] < 1e-4


def test_the_prior_is_chosen_on_validation_rows_and_noise_kept_to_the_last_layers(tokenizer):
    model, *_ = prepared("llama-likelihood", tokenizer)
    task = make_task(readout="likelihood")
    posterior = Laplace(prior="validation", last_layers=1).fit(model, task, tokenizer=tokenizer)
    assert isinstance(posterior.posterior, KroneckerGaussian)
    assert set(posterior.posterior.strength) == {n for n in posterior.mean if ".1." in n}
    from bayeslora.methods.laplace.method import CANDIDATES

    assert posterior.posterior.precision in CANDIDATES


def poisoned(params):
    return {name: torch.full_like(p, math.nan) for name, p in params.items()}


def test_a_fit_that_fails_says_so(tokenizer):
    model, *_ = prepared("llama-likelihood", tokenizer)
    task = make_task(readout="likelihood")
    with pytest.raises(InputError, match="leaves Laplace no parameter"):
        Laplace(last_layers=0).fit(model, task, tokenizer=tokenizer)
    from bayeslora.posteriors import Point

    with pytest.raises(InputError, match="curvature is not finite"):
        Laplace().fit(model, task, start=Point(poisoned(read(model))), tokenizer=tokenizer)
    for settings, said in (
        ({"structure": "full"}, "kron or diag"),
        ({"prior": 0.0}, "prior precision must be finite and positive"),
        ({"prior": "guess"}, "not 'guess'"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"last_layers": -1}, "last_layers must be at least 0"),
    ):
        with pytest.raises(InputError, match=said):
            Laplace(**settings)


def test_dora_is_refused_in_words(tokenizer):
    model = make_model("llama", use_dora=True)
    with pytest.raises(InputError, match="not a weight of a linear layer"):
        Laplace().fit(model, make_task(readout="likelihood"), tokenizer=tokenizer)
