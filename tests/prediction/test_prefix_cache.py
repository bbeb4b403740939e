"""A common beginning that is run once gives what whole prompts give."""

from dataclasses import replace

import pytest
import torch
from support.tiny import make_model, make_split, same_state, state_of

from bayeslora.models import cache_argument
from bayeslora.params import read
from bayeslora.posteriors import DiagonalGaussian, Draws, Point
from bayeslora.posteriors.transforms import restricted
from bayeslora.prediction import PassOptions, predict
from bayeslora.prediction import prefix_cache as prefix
from bayeslora.prediction.encoding import Encoded

INSTRUCTION = "Question: red holds 1 blue, old gold holds 2 dark green, pale red holds 3 blue. Answer: green.\n"


def instructed(split):
    """The same examples after an instruction of 34 tokens."""
    examples = tuple(replace(e, text=INSTRUCTION + e.text) for e in split)
    return replace(split, examples=examples)


def posteriors(model):
    mean = read(model)
    gaussian = DiagonalGaussian(mean, {name: torch.full_like(value, 0.01) for name, value in mean.items()})
    return {"point": Point(mean), "gaussian": gaussian, "last-layer": restricted(gaussian, 1)}


def tokens_in(model):
    """The number of tokens in each pass over the layers, and the hook that counts them."""
    found = []
    base = model.get_base_model()
    layers = getattr(base, base.base_model_prefix)

    def note(_, args, kwargs):
        found.append((args[0] if args else kwargs["input_ids"]).numel())

    return found, layers.register_forward_pre_hook(note, with_kwargs=True)


@pytest.mark.parametrize("name", ["point", "gaussian", "last-layer"])
@pytest.mark.parametrize("budget", [150, 4000])
def test_a_beginning_that_is_run_once_changes_no_answer(name, budget, kind, tokenizer):
    model = kind.build()
    posterior, split = posteriors(model)[name], instructed(kind.task().test)
    before = state_of(model)
    counts, hook = tokens_in(model)
    usual = {"draws": Draws(3, seed=1), "tokenizer": tokenizer, "token_budget": budget}
    once = predict(model, posterior, split, **usual)
    counts.clear()  # of the trials
    again = predict(model, posterior, split, **usual)
    assert torch.equal(again.log_probs, once.log_probs)
    spent = sum(counts)
    counts.clear()
    whole = predict(model, posterior, split, options=PassOptions(share_prefix=False), **usual)
    hook.remove()
    assert same_state(model, before)
    atol = 0.05 if kind.dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(once.log_probs, whole.log_probs, rtol=0, atol=atol)
    torch.testing.assert_close(once.mean_log_probs, whole.mean_log_probs, rtol=0, atol=atol)
    if budget == 4000:
        assert (spent < 0.8 * sum(counts)) == (kind.model != "bert")


def test_the_beginning_is_the_longest_that_leaves_every_prompt_a_token():
    def common(*prompts):
        return prefix.common_prefix([Encoded(p, ((1,),), 0) for p in prompts])

    assert common((1, 2, 3, 4), (1, 2, 5), (1, 2, 3, 9, 9)) == (1, 2)
    assert common((1, 2, 3), (1, 2, 3)) == (1, 2)
    assert common((1, 2, 3), (1, 2, 3, 4)) == (1, 2)
    assert common((7, 2), (1, 2)) == ()
    assert common((1, 2, 3)) == ()


def test_prompts_without_a_long_beginning_are_run_whole(tokenizer):
    model, split = make_model("llama"), make_split("test", 6, 2, classes=False, readout="letters")
    counts, hook = tokens_in(model)
    predict(model, Point(read(model)), split, tokenizer=tokenizer)
    hook.remove()
    assert len(counts) == 1


def test_a_model_that_does_not_go_on_from_kept_keys_is_given_whole_prompts(tokenizer):
    model, split = make_model("llama"), instructed(make_split("test", 6, 2, classes=False, readout="letters"))
    wanted = predict(model, Point(read(model)), split, tokenizer=tokenizer, options=PassOptions(share_prefix=False))
    model = make_model("llama")  # another object: the outcome of a trial is kept with the model
    attention = model.base_model.model.model.layers[1].self_attn
    name = cache_argument(attention.forward)
    attention.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, name: None}), with_kwargs=True)
    found = predict(model, Point(read(model)), split, tokenizer=tokenizer)
    torch.testing.assert_close(found.log_probs, wanted.log_probs, rtol=0, atol=2e-5)
