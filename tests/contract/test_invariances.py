"""What a prediction, a text or a training run does not depend on: bit for bit, or up to the rounding of float32.

The rounding bound is Higham and Mary's (2019, SIAM J. Sci. Comput. 41(5)): a chain of K products of inner length n is
off by 5·K·√n·u relative to its size, u = 2^-24, but with probability 2·exp(-12.5) a product. K is twice the model's
linear layers, for attention and its sums; the size is that of the largest log-probability.
"""

import math
import random

import numpy as np
import pytest
import torch
from support.around import AROUND, LINEARISED
from support.methods_table import DROPOUT, TABLE
from support.tiny import Kind, arguments, gaussian, make_model, make_split, make_task, same_params
from torch import nn

import bayeslora as bl
from bayeslora.methods import Blob, Ivon, Map, McDropout, Swag
from bayeslora.posteriors import Draws, Mixture
from bayeslora.posteriors.linearised import logit_draws
from bayeslora.prediction import PassOptions, predict
from bayeslora.training.run import fit

OPENING = "Question: bag holds 1 red, 2 blue, 3 green. Answer: dark green.\n" * 2  # long enough to be run once
DRAWS = Draws(4, seed=3)
FAMILIES = {name: make for name, make in {**AROUND, **LINEARISED}.items() if name != "with-token-dropout"}
QUICK = ("diagonal", "mixture", "dropout")
ANSWERING = [
    *(pytest.param(f, "likelihood", marks=[] if f in QUICK else pytest.mark.slow) for f in FAMILIES),
    *(pytest.param(f, "letters", marks=pytest.mark.slow) for f in (*QUICK, "linearised")),
]


def rounding(model, log_probs):
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    width = max(m.in_features for m in linears)
    size = float(log_probs[torch.isfinite(log_probs)].abs().max())
    return 5 * 2 * len(linears) * math.sqrt(width) * 2**-24 * size


def of_rows(prediction, rows):
    """The log-probabilities [S n C] of some rows, and at the mean."""
    return prediction.log_probs[:, rows], prediction.mean_log_probs[rows]


def assert_same(found, wanted, bound):
    for one, other in zip(found, wanted, strict=True):
        size = min(one.shape[-1], other.shape[-1])  # a subset may lack the row with the most choices
        assert bool((one[..., size:] == -math.inf).all())
        assert bool((other[..., size:] == -math.inf).all())
        torch.testing.assert_close(one[..., :size], other[..., :size], rtol=0, atol=bound)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "readout"), ANSWERING)
def test_answers_depend_on_the_example_the_draw_and_the_seed_alone(family, readout, tokenizer):
    model = make_model("llama")
    split = make_split("test", 13, 2, classes=False, readout=readout, before=OPENING)
    posterior, count = FAMILIES[family](model), len(split)

    def answers(rows=split, draws=DRAWS, budget=400, **options):
        return predict(
            model, posterior, rows, draws, tokenizer=tokenizer, token_budget=budget, options=PassOptions(**options)
        )

    wanted = answers()
    # the root of a covariance is off by the root of its rounding, which is relative to its largest eigenvalue
    bound = rounding(model, wanted.log_probs)
    if "linearised" in family:
        bound = math.sqrt(bound) * float(wanted.log_probs.std(0).nan_to_num().max())
    assert bound < 0.02
    every = list(range(count))
    assert torch.equal(answers().log_probs, wanted.log_probs)
    for found in (answers(budget=60), answers(budget=10_000), answers(stack=False), answers(share_prefix=False)):
        assert_same(of_rows(found, every), of_rows(wanted, every), bound)
    torch.set_num_threads(2)
    try:
        threaded = answers()
    finally:
        torch.set_num_threads(1)
    assert_same(of_rows(threaded, every), of_rows(wanted, every), bound)

    turned = answers(split.take(every[::-1]))
    assert_same(of_rows(turned, every[::-1]), of_rows(wanted, every), bound)
    for rows in ([5], [3, 4, 8], every[:10]):
        assert_same(of_rows(answers(split.take(rows)), range(len(rows))), of_rows(wanted, rows), bound)

    more = answers(draws=Draws(2 * wanted.draws, seed=3))
    assert_same((more.log_probs[: wanted.draws], more.mean_log_probs), of_rows(wanted, every), bound)
    assert more.draws == (posterior.distinct or 2 * wanted.draws)


def test_logits_have_the_same_noise_in_any_place_with_any_number_of_draws():
    """Bit for bit; the noise of missing choices is none, whatever else is in the batch."""
    rng = torch.Generator().manual_seed(0)
    root = torch.randn(5, 3, 3, generator=rng)
    logits, covariance, contents = torch.randn(5, 3, generator=rng), root @ root.mT, list("abcde")
    whole = logit_draws(logits, covariance, contents, 40, 2)
    for rows in ([2], [4, 0], [1, 2, 3]):
        picked = [contents[i] for i in rows]
        assert torch.equal(logit_draws(logits[rows], covariance[rows], picked, 40, 2), whole[:, rows])
    for count in (1, 7, 39):
        assert torch.equal(logit_draws(logits, covariance, contents, count, 2), whole[:count])
    wider = nn.functional.pad(logits, (0, 2), value=-math.inf)
    found = logit_draws(wider, nn.functional.pad(covariance, (0, 2, 0, 2)), contents, 40, 2)
    torch.testing.assert_close(found[..., :3], whole, rtol=0, atol=1e-6)
    assert not torch.equal(logit_draws(logits, covariance, contents, 40, 3), whole)


def test_draws_of_logits_move_with_the_covariance_even_where_its_eigenvectors_turn():
    logits, near = torch.zeros(1, 3), torch.eye(3)[None]
    other = near + 1e-6 * torch.tensor([[0.0, 1.0, -1.0], [1.0, 0.0, 1.0], [-1.0, 1.0, 0.0]])
    one, two = (logit_draws(logits, covariance, ["a"], 50, 0) for covariance in (near, other))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_texts_of_one_draw_are_those_of_the_average_of_one(tokenizer):
    model = make_model("llama")
    how = {"tokenizer": tokenizer, "max_new_tokens": 4}
    prompts = ["Question: bag holds 3 red, 5 blue", "Answer"]
    average = bl.generate(model, gaussian(model), prompts, Draws(1, 5), **how)
    each = bl.generate_each(model, gaussian(model), prompts, Draws(3, 5), **how)
    for one, several in zip(average, each, strict=True):
        assert one.token_ids == several.answers[0].token_ids
        bound = rounding(model, one.log_probs)
        torch.testing.assert_close(one.log_probs, several.answers[0].log_probs, rtol=0, atol=bound)
    for size in (1, 2):
        turned = bl.generate(model, gaussian(model), prompts[::-1], Draws(1, 5), batch_size=size, **how)
        assert [a.token_ids for a in turned[::-1]] == [a.token_ids for a in average]


def test_batches_are_sampled_independently_of_each_other(tokenizer):
    """Ten texts of four tokens that are alike by chance have a probability under 1e-3 of all; they were all alike."""
    model = make_model("llama")
    how = {"tokenizer": tokenizer, "max_new_tokens": 4, "do_sample": True, "temperature": 2.0, "eos_token_id": None}
    found = bl.generate(model, gaussian(model), ["Answer"] * 10, 2, batch_size=1, **how)
    assert len({a.token_ids for a in found}) > 1


def global_state():
    """The states of torch and NumPy; beartype, which looks at the tests' shapes, takes from Python's own."""
    return torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].copy())


def same_global_state(before):
    return all(map(torch.equal, global_state(), before))


def test_nothing_after_training_touches_the_global_generators(tokenizer, tmp_path):
    model, split = make_model("llama"), make_split("test", 5, 2, classes=False, readout="letters")
    before = global_state()
    posterior = Mixture((gaussian(model), FAMILIES["linearised"](model)))
    for sampling in ("independent", "antithetic", "simplex", "sobol"):
        found = predict(model, posterior, split, Draws(3, sampling=sampling), tokenizer=tokenizer)
    bl.evaluate(found, split)
    bl.generate(model, gaussian(model), ["Answer"], 2, tokenizer=tokenizer, max_new_tokens=2, do_sample=True)
    gaussian(model).save_pretrained(tmp_path / "p")
    bl.load_posterior(tmp_path / "p", model)
    bl.export_draws(gaussian(model), tmp_path / "draws", 2)
    found.save(tmp_path / "prediction.safetensors")
    bl.Prediction.load(tmp_path / "prediction.safetensors")
    assert same_global_state(before)


def test_fitting_to_a_trained_adapter_touches_no_global_generator(tokenizer):
    model, task = make_model("llama"), make_task(readout="likelihood")
    for method in (TABLE[n].method for n in ("laplace", "tfb", "isotropic", "temperature")):
        before = global_state()
        method.fit(model, task, tokenizer=tokenizer)
        assert same_global_state(before), method


def trained(method, folder, tokenizer, **changes):
    kind = Kind("llama", readout="likelihood")
    return fit(kind.build(lora_dropout=DROPOUT), kind.task(), method, arguments(folder, **changes), tokenizer=tokenizer)


@pytest.mark.parametrize("method", [Map(), pytest.param(Swag(), marks=pytest.mark.slow), Blob(), Ivon(), McDropout()],
                         ids=lambda m: m.name)  # fmt: skip
def test_a_run_depends_on_its_seed_and_not_on_what_was_done_before(method, tokenizer, tmp_path):
    first = trained(method, tmp_path / "a", tokenizer, max_steps=4)
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    trained(Blob("elbo"), tmp_path / "b", tokenizer, max_steps=2, seed=8)
    again = trained(method, tmp_path / "c", tokenizer, max_steps=4)
    other = trained(method, tmp_path / "d", tokenizer, max_steps=4, seed=4)
    assert same_params(again.mean, first.mean)
    assert same_params(again.draw(1), first.draw(1))
    assert not same_params(other.mean, first.mean)


@pytest.mark.slow
@pytest.mark.parametrize("method", [Swag(), Blob(), Ivon()], ids=lambda m: m.name)
def test_workers_of_the_data_loader_change_no_bit(method, tokenizer, tmp_path):
    alone = trained(method, tmp_path / "a", tokenizer)
    for workers in (1, 2):
        found = trained(method, tmp_path / str(workers), tokenizer, dataloader_num_workers=workers)
        assert same_params(found.mean, alone.mean)
        assert same_params(found.draw(1), alone.draw(1))
