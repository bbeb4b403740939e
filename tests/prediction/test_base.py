"""The base's answers are those of a model that never had an adapter, whatever stands beside them."""

import math
from dataclasses import replace

import pytest
import torch
from support.tiny import KINDS, gaussian, make_base, make_model, make_split, same_state, state_of

import bayeslora as bl
from bayeslora.errors import InputError
from bayeslora.params import read
from bayeslora.posteriors import (
    ColumnDropout,
    DiagonalGaussian,
    KroneckerGaussian,
    Linearised,
    Mixture,
    Point,
    Scaled,
    TokenDropout,
)
from bayeslora.prediction import PassOptions, predict
from bayeslora.prediction.readouts import readout_for

CAUSAL = [name for name, kind in KINDS.items() if kind.model != "bert"]
SHOTS = "Question bag holds 3 red, 4 blue Answer red. Question bag holds 1 red, 2 green Answer green. "
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def log_likelihood(base, prompt, answer):
    """Sum of log p(token) of an answer after a prompt, by the bare model."""
    ids = [*prompt, *answer]
    log_p = base(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(float(log_p[len(prompt) + k - 1, token]) for k, token in enumerate(answer))


@torch.inference_mode()
def by_hand(kind, split, tokenizer, dtype=torch.float32):
    """The base's log-probabilities, choice by choice, from a model without PEFT."""
    base = make_base(kind, dtype).eval()
    rows, _ = readout_for(make_model(kind, dtype), split, tokenizer).encode(split)
    found = torch.full((len(rows), max(len(row.answers) for row in rows)), -math.inf)
    for n, row in enumerate(rows):
        for c, answer in enumerate(row.answers):
            score = log_likelihood(base, row.prompt, answer) * (row.scales[c] if row.scales else 1)
            if row.neutral:
                score -= log_likelihood(base, row.neutral, row.neutral_answers[c])
            found[n, c] = score
    return found.log_softmax(-1)


def rows(readout="likelihood", **form):
    return make_split("test", 5, 2, classes=False, readout=readout, **form)


def kronecker(model):
    mean = read(model)
    eye = {n: torch.eye(v.shape[1]) for n, v in mean.items()}
    left = {n: torch.eye(v.shape[0]) for n, v in mean.items()}

    def ones(of):
        return {n: torch.cat([torch.ones(len(v)), torch.zeros(1)]) for n, v in of.items()}

    strength = {n: torch.ones(()) for n in mean}
    return KroneckerGaussian(mean, ones(left), left, ones(eye), eye, strength, 100.0)


def in_last_layer(model):
    return bl.restricted(gaussian(model), 1)


FAMILIES = {
    "point": lambda model: Point(read(model)),
    "gaussian": gaussian,
    "columns": lambda model: ColumnDropout(read(model), 0.2, {n: 1.0 for n in read(model) if "lora_A" in n}),
    "mixture": lambda model: Mixture((gaussian(model), Point(read(model)))),
    "tokens": lambda model: TokenDropout(read(model), 0.2),
    "mixed": lambda model: Mixture((gaussian(model), TokenDropout(read(model), 0.2))),
    "linearised": lambda model: Linearised(kronecker(model)),
    "scaled": lambda model: Scaled(
        gaussian(model),
        {f"{of}.{part}": torch.tensor([v]) for of in ("draws", "mean") for part, v in (("weight", 0.3), ("bias", 0.0))},
    ),
    "answers": lambda model: bl.restricted(gaussian(model), tokens="answer"),
    "last layer": in_last_layer,
}


@pytest.mark.parametrize("name", CAUSAL)
def test_the_bases_answers_are_those_of_a_model_without_an_adapter(tokenizer, name):
    kind = KINDS[name]
    split = rows(kind.readout)
    found = predict(kind.build(), gaussian(kind.build()), split, 3, base=True, tokenizer=tokenizer)
    wanted = by_hand(kind.model, split, tokenizer, kind.dtype)
    tolerance = CLOSE if kind.dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(found.base_log_probs, wanted, **tolerance)


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize(
    "split",
    [rows(before=SHOTS), rows(normalisation="unconditional"), rows(normalisation="characters"), rows("letters")],
    ids=["prefix", "neutral prompt", "characters", "letters"],
)
def test_they_are_the_same_after_a_prefix_or_against_a_neutral_prompt_stacked_or_not(tokenizer, split, stack):
    model = make_model()
    found = predict(model, gaussian(model), split, 3, base=True, tokenizer=tokenizer, options=PassOptions(stack=stack))
    torch.testing.assert_close(found.base_log_probs, by_hand("llama", split, tokenizer), **CLOSE)


@pytest.mark.parametrize("draws", [0, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_same_base_beside_the_draws_it_would_have_without(tokenizer, name, draws):
    model, split = make_model(), rows()
    before, posterior = state_of(model), FAMILIES[name](model)
    found = predict(model, posterior, split, draws, base=True, tokenizer=tokenizer)
    plain = predict(model, posterior, split, draws, tokenizer=tokenizer)
    torch.testing.assert_close(found.base_log_probs, by_hand("llama", split, tokenizer), **CLOSE)
    torch.testing.assert_close(found.log_probs, plain.log_probs, **CLOSE)
    torch.testing.assert_close(found.mean_log_probs, plain.mean_log_probs, **CLOSE)
    assert plain.base_log_probs is None
    assert same_state(model, before)


def test_without_the_mean_and_under_a_tolerance_there_is_a_base_too(tokenizer):
    model, split = make_model(), rows()
    wanted = by_hand("llama", split, tokenizer)
    for options in ({"mean": False}, {"draws": bl.Draws(12, tolerance=0.02, minimum=2)}):
        found = predict(model, gaussian(model), split, **options, base=True, tokenizer=tokenizer)
        torch.testing.assert_close(found.base_log_probs, wanted, **CLOSE)
        assert (found.mean_log_probs is None) == ("mean" in options)


@pytest.mark.parametrize(
    ("lora", "posterior", "more"),
    [({}, gaussian, 0), ({}, in_last_layer, 1), ({"layers_to_transform": [1]}, gaussian, 0)],
    ids=["along", "by itself", "in the last layers, as the adapter is"],
)
def test_it_goes_along_with_the_draws_unless_they_share_layers_that_it_does_not(tokenizer, lora, posterior, more):
    """A stacked pass calls the last layer once, however many draws it holds."""
    model, split, calls = make_model(**lora), rows(), []

    def passes(base):
        predict(model, posterior(model), split, 3, base=base, tokenizer=tokenizer)  # what is tried once is tried here
        calls.clear()
        predict(model, posterior(model), split, 3, base=base, tokenizer=tokenizer)
        return len(calls)

    hook = model.get_base_model().model.layers[-1].register_forward_hook(lambda *_: calls.append(1))
    try:
        assert passes(True) == passes(False) + more
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": {"embed_tokens": [3, 5]}},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=lambda lora: "-".join(map(str, lora.items())),
)
def test_adapters_of_which_more_is_trained_than_a_and_b_have_the_same_base(tokenizer, lora):
    model, split = make_model(**lora), rows()
    mean = {
        n: v + 0.1 * torch.randn(v.shape, generator=torch.Generator().manual_seed(4)) for n, v in read(model).items()
    }
    model.requires_grad_(False)
    before, wanted = state_of(model), by_hand("llama", split, tokenizer)
    posterior = DiagonalGaussian(mean, {n: torch.full_like(v, 0.01) for n, v in mean.items()})
    found = predict(model, posterior, split, 2, base=True, tokenizer=tokenizer)
    torch.testing.assert_close(found.base_log_probs, wanted, **CLOSE)
    assert not torch.allclose(found.log_p, wanted, rtol=0, atol=1e-2)
    assert same_state(model, before)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (make_model("bert"), r"its classification head \(.*classifier.*\) was trained with the adapter; use a causal"),
        (make_model(bias="lora_only"), r"trained the base's biases \(bias='lora_only'\).* leave the base out"),
        (make_model(init_lora_weights="pissa"), r"init_lora_weights='pissa' has changed the base's weights"),
        (make_model(init_lora_weights="olora"), r"init_lora_weights='olora' has changed the base's weights"),
        (make_model(layer_replication=[(0, 2), (1, 2)]), "layer_replication has changed the base's layers"),
    ],
    ids=["head", "bias", "pissa", "olora", "replicated"],
)
def test_a_base_that_has_no_answer_is_refused_in_one_sentence(tokenizer, model, told):
    classes = model.active_peft_config.task_type == "SEQ_CLS"
    split = make_split("test", 3, 2, classes=classes, readout="auto" if classes else "likelihood")
    with pytest.raises(InputError, match=told):
        predict(model, gaussian(model), split, 2, base=True, tokenizer=tokenizer)
    predict(model, gaussian(model), split, 2, tokenizer=tokenizer)


def test_drift_and_ratio_of_a_model_that_was_not_tuned_are_zero(tokenizer):
    model = make_model()
    untuned = Point({n: torch.zeros_like(v) if "lora_B" in n else v for n, v in read(model).items()})
    found = predict(model, untuned, rows(), base=True, tokenizer=tokenizer)
    torch.testing.assert_close(found.drift, torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.likelihood_ratio, torch.zeros(5), rtol=0, atol=1e-6)


def test_a_scaled_posterior_is_held_against_the_base_as_it_is(tokenizer):
    model, split = make_model(), rows()
    plain = predict(model, FAMILIES["gaussian"](model), split, 3, base=True, tokenizer=tokenizer)
    found = predict(model, FAMILIES["scaled"](model), split, 3, base=True, tokenizer=tokenizer)
    torch.testing.assert_close(found.base_log_probs, plain.base_log_probs)
    assert not torch.allclose(found.drift, plain.drift, rtol=1e-3)
    again = replace(plain, log_probs=found.log_probs)
    torch.testing.assert_close(found.drift, again.drift, rtol=1e-4, atol=1e-6)
