"""A model on a GPU, or with its layers on two, answers and learns as on the CPU: no tensor meets one from elsewhere.

The devices are pretended, see `support.pretended`. With two, each layer moves its inputs to where it is, as with
``device_map="auto"``.
"""

import pytest
import torch
from support.families import A1, FAMILIES
from support.pretended import FIRST, SECOND, OtherDeviceError, later_half, moved, place, pretended, put
from support.tiny import gaussian, make_model, make_split
from torch import nn
from torch.nn import functional

from bayeslora.methods.laplace.ggn import DiagonalCurvature, KroneckerCurvature, accumulated
from bayeslora.methods.regularisers import answer_loss
from bayeslora.params import lora_parameters, read
from bayeslora.posteriors import Draws, Linearised
from bayeslora.posteriors.noise import Noise
from bayeslora.posteriors.transforms import restricted
from bayeslora.prediction import PassOptions, predict, readout_for
from bayeslora.prediction.generation import generate, generate_each
from bayeslora.prediction.jacobians import linear_sites
from bayeslora.prediction.likelihoods import Likelihoods
from bayeslora.prediction.memory import draws_for
from bayeslora.prediction.passes import batched
from bayeslora.training.distillation import soft_loss

normal = Noise.normal


def model():
    return make_model().eval()


@pytest.fixture(params=[1, 2], ids=["one-gpu", "two-gpus"])
def both(request):
    """What is found on the CPU, and on one GPU or two."""
    return lambda work: moved(work, model, apart=request.param == 2)


def agree(pair, tolerance=1e-5):
    wanted, found = pair
    assert bool(wanted.isfinite().any())
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("normalisation", ["sum", "tokens", "unconditional"])
@pytest.mark.parametrize(
    "how", [{"token_budget": 300}, {"token_budget": 300, "options": PassOptions(stack=False)}, {"token_budget": 60}]
)
def test_prediction_by_draws_is_that_of_the_cpu(normalisation, how, both, tokenizer):
    split = make_split("test", 6, 5, classes=False, readout="likelihood", normalisation=normalisation)
    agree(both(lambda model: predict(model, gaussian(model), split, 3, tokenizer=tokenizer, **how).log_probs))


@pytest.mark.parametrize("before", ["", "Question: red holds 1 blue, old gold holds 2 dark green. "])
@pytest.mark.parametrize("readout", ["letters", "likelihood"])
def test_answers_go_on_from_prompts_where_their_layers_are(before, readout, both, tokenizer):
    split = make_split("test", 6, 5, classes=False, readout=readout, before=before)
    asked = {"tokenizer": tokenizer, "token_budget": 300}
    agree(both(lambda model: predict(model, restricted(gaussian(model), tokens="answer"), split, 3, **asked).log_probs))


def test_as_many_draws_as_an_example_needs_are_those_of_the_cpu(both, tokenizer):
    split, draws = make_split("test", 6, 5, classes=False, readout="letters"), Draws(8, tolerance=0.02, minimum=2)
    agree(both(lambda model: predict(model, gaussian(model), split, draws, tokenizer=tokenizer, token_budget=99).log_p))


def test_a_classification_head_answers_where_it_is(tokenizer):
    split = make_split("test", 6, 5, classes=True)

    def work(model):
        return predict(model, gaussian(model), split, 3, tokenizer=tokenizer, token_budget=300).log_probs

    agree(moved(work, lambda: make_model("bert").eval()))


def test_a_common_beginning_is_kept_where_its_layers_are(both, tokenizer):
    split = make_split("test", 6, 5, classes=False, readout="letters", before="Question: red holds 1 blue. " * 4)
    agree(
        both(lambda model: predict(model, gaussian(model), split, 3, tokenizer=tokenizer, token_budget=300).log_probs)
    )


@pytest.mark.parametrize(
    "how",
    [{}, {"do_sample": True}, {"num_beams": 2}, {"stop_strings": "blue"}, {"tokens": "answer"}],
    ids=["greedy", "sampled", "beams", "stop", "noise on the answer"],
)
def test_texts_are_generated_where_the_model_is(how, both, tokenizer):
    how = dict(how)
    prompts, tokens = ["bag holds 3 red", "Question: gold"], how.pop("tokens", "all")

    def work(model):
        posterior = restricted(gaussian(model), tokens=tokens)
        found = generate(model, posterior, prompts, 3, tokenizer=tokenizer, max_new_tokens=5, batch_size=2, **how)
        return torch.cat([torch.cat([answer.log_probs, answer.draw_log_probs.flatten()]) for answer in found])

    agree(both(work))


def test_each_draw_generates_where_the_model_is(both, tokenizer):
    def work(model):
        found = generate_each(
            model, gaussian(model), ["bag holds"], 3, tokenizer=tokenizer, max_new_tokens=4, batch_size=1
        )
        return torch.cat([answer.log_probs for answer in found[0].answers])

    agree(both(work))


def test_labels_and_counts_meet_the_scores_where_these_are(both, tokenizer):
    split = make_split("test", 6, 5, classes=False, readout="likelihood")

    def losses(model):
        readout, where = readout_for(model, split, tokenizer), place(next(model.parameters()))
        batch = {k: v.to(where) for k, v in readout.collate(readout.encode(split)[0]).items()}
        labels, count = batch.pop("labels"), torch.tensor(6.0).to(where)
        with readout.attached(model):
            logits = model(**batch).logits
        soft = soft_loss(torch.full((6, 4), 0.25).log())
        values = [answer_loss({"logits": logits}, labels, count), soft({"logits": logits}, torch.arange(6), count)]
        sum(values).backward()
        gradients = [p.grad.cpu().flatten() for p in lora_parameters(model).values()]
        return torch.cat([*(v.detach().cpu()[None] for v in values), *gradients])

    agree(both(losses))


@pytest.mark.parametrize("kind", [DiagonalCurvature, KroneckerCurvature])
def test_curvature_is_summed_where_each_layer_is(kind, both, tokenizer):
    split = make_split("test", 6, 5, classes=False, readout="likelihood")

    def predicted(model):
        readout = readout_for(model, split, tokenizer)
        sites = linear_sites(model)
        curvature = kind(sites) if kind is DiagonalCurvature else kind(sites, 8)
        with readout.attached(model):
            batches = batched(model, readout, readout.encode(split)[0], 200)
            accumulated(model, curvature, batches, split.labels)
        posterior = Linearised(curvature.posterior(read(model), 10.0, None), None)
        return predict(model, posterior, split, tokenizer=tokenizer, token_budget=200).log_p

    agree(both(predicted), 1e-4)


def test_texts_are_scored_where_the_head_is(both, tokenizer):
    split = make_split("test", 1, 5, classes=False, readout="likelihood")
    pairs = [((3, 4, 5), (6, 7)), ((3, 4, 5), (8,)), ((9, 10), (11, 12, 13))]

    def scored(model):
        draws = [gaussian(model).draw(k, 0) for k in range(2)]
        readout = readout_for(model, split, tokenizer)
        return Likelihoods(model, draws, readout, 100).of(pairs, lambda _: None)[0]

    agree(both(scored))


@pytest.mark.parametrize("sampling", ["independent", "antithetic", "simplex", "sobol"])
@pytest.mark.parametrize("family", ["diagonal", "low-rank", "kronecker", "dropout", "mixture", "scaled"])
def test_draws_are_made_where_the_posterior_is_and_are_those_of_the_cpu(family, sampling, monkeypatch):
    monkeypatch.setattr("bayeslora.posteriors.philox.AT_ONCE", 2)  # blocks of 8 numbers, so that several are needed
    posterior = FAMILIES[family]()
    devices = {name: torch.device(SECOND if name == A1 else FIRST) for name in posterior.mean}
    with pretended(nn.Identity()):
        there = posterior.placed(devices)
        drawn = {k: there.draw(k, 3, sampling) for k in (0, 1, 2, 7)}
    for k, draw in drawn.items():
        assert {name: torch.device(place(value)) for name, value in draw.items()} == devices
        for name, value in posterior.draw(k, 3, sampling).items():
            torch.testing.assert_close(draw[name], value, rtol=1e-6, atol=1e-6)


def test_a_prediction_makes_its_draws_on_the_models_devices(monkeypatch, tokenizer):
    made = []
    monkeypatch.setattr(Noise, "normal", lambda self, like, *rest: made.append(like) or normal(self, like, *rest))
    split, apart = make_split("test", 3, 5, classes=False, readout="likelihood"), model()
    with pretended(apart, *later_half(apart)):
        predict(apart, gaussian(apart), split, 3, tokenizer=tokenizer, token_budget=300)
    assert {place(value) for like in made for value in like.values()} == {FIRST, SECOND}


def test_a_posterior_too_large_for_a_copy_stays_where_it_is(monkeypatch):
    plain, apart = model(), model()
    posterior = gaussian(plain)
    assert draws_for(plain, posterior) is posterior  # on the CPU there is nothing to copy
    with pretended(apart):
        copy = draws_for(apart, posterior)
        assert {place(value) for value in copy.mean.values()} == {FIRST}
        assert draws_for(apart, posterior) is copy
        monkeypatch.setattr("bayeslora.prediction.memory.numbers", lambda _: sum(p.numel() for p in plain.parameters()))
        assert draws_for(apart, posterior) is posterior


def test_the_pretence_finds_a_tensor_that_was_left_on_the_cpu(monkeypatch, tokenizer):
    split, apart = make_split("test", 6, 5, classes=False, readout="likelihood"), model()
    monkeypatch.setattr(
        "bayeslora.prediction.passes.on", lambda batch, _: {k: batch[k] for k in batch if k != "labels"}
    )
    with pretended(apart), pytest.raises(OtherDeviceError, match="cpu"):
        predict(apart, gaussian(apart), split, 3, tokenizer=tokenizer, token_budget=300)


def test_the_pretence_mixes_no_places():
    first, second, here = put(torch.ones(2), FIRST), put(torch.ones(2), SECOND), torch.ones(2)
    index = torch.tensor([0])
    with pretended(nn.Identity()):
        for mixed in (
            lambda: functional.mse_loss(first, second),
            lambda: first + here,
            lambda: torch.cat([first, here]),
            lambda: first.scatter(0, index, first[:1]),
            lambda: first.gather(0, index),
            lambda: torch.equal(first, here),
            lambda: torch.randn(2, device=FIRST, generator=torch.Generator("cpu")),
            first.numpy,
        ):
            with pytest.raises(OtherDeviceError):
                mixed()
        for allowed in (first + second.to(first.device), first[index], first * torch.tensor(2.0), nn.Parameter(first)):
            assert place(allowed) == str(allowed.device) == FIRST
        assert place(first.copy_(here)) == FIRST
        assert place(first.cpu()) == "cpu"
