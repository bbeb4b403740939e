"""The likelihood ratio of prompts is that of a loop over their tokens, under each draw and under the base."""

import math

import pytest
import torch
from support.tiny import KINDS, gaussian, make_base, make_model, make_split, same_state, state_of

import bayeslora as bl
from bayeslora.errors import InputError
from bayeslora.params import read, swapped
from bayeslora.posteriors import DiagonalGaussian, Draws, Mixture, Point, Scaled, TokenDropout
from bayeslora.prediction import PassOptions
from bayeslora.prediction.readouts import readout_for
from bayeslora.tasks.types import Example, Format, Split

CLOSE = {"rtol": 1e-3, "atol": 2e-5}
CAUSAL = [name for name, kind in KINDS.items() if kind.model != "bert"]


def rows(readout="likelihood", **form):
    return make_split("test", 6, 2, classes=False, readout=readout, **form)


def wide(model):
    mean = read(model)
    return DiagonalGaussian(mean, {name: torch.full_like(value, 0.05) for name, value in mean.items()})


@torch.inference_mode()
def log_likelihood(model, prompt):
    """Sum of log p(token) of all tokens of a prompt but its first, one by one."""
    log_p = model(input_ids=torch.tensor([prompt])).logits[0].float().log_softmax(-1).double()
    return sum(float(log_p[k, token]) for k, token in enumerate(prompt[1:]))


def by_hand(kind, model, draws, split, tokenizer, dtype=torch.float32):
    """log of the draws' average likelihood less the base's, a token."""
    base, found = make_base(kind, dtype).eval(), []
    for row in readout_for(model, split, tokenizer).encode(split)[0]:
        each = []
        for draw in draws:
            with swapped(model, draw):
                each.append(log_likelihood(model.eval(), row.prompt))
        tuned = torch.tensor(each).logsumexp(0) - math.log(len(draws))
        found.append((float(tuned) - log_likelihood(base, row.prompt)) / (len(row.prompt) - 1))
    return torch.tensor(found)


@pytest.mark.parametrize("draws", [0, 3])
@pytest.mark.parametrize("name", CAUSAL)
def test_it_is_the_ratio_of_a_loop_over_tokens(tokenizer, name, draws):
    kind = KINDS[name]
    model, split = kind.build(), rows(kind.readout)
    before, posterior = state_of(model), wide(model)
    found = bl.prompt_likelihood_ratio(model, posterior, split, Draws(draws, seed=4), tokenizer=tokenizer)
    assert same_state(model, before)
    weights = [posterior.draw(k, 4) for k in range(draws)] or [posterior.mean]
    wanted = by_hand(kind.model, model, weights, split, tokenizer, kind.dtype)
    tolerance = CLOSE if kind.dtype == torch.float32 else {"rtol": 0.1, "atol": 0.02}
    torch.testing.assert_close(found, wanted, **tolerance)


@pytest.mark.parametrize("options", [PassOptions(stack=False), PassOptions()])
@pytest.mark.parametrize("form", [{"normalisation": "unconditional"}, {"before": "Question bag holds 3 red. " * 4}])
def test_how_answers_are_scored_and_how_passes_are_run_does_not_matter(tokenizer, form, options):
    model, split = make_model(), rows(**form)
    posterior = wide(model)
    found = bl.prompt_likelihood_ratio(
        model, posterior, split, 2, tokenizer=tokenizer, options=options, token_budget=90
    )
    wanted = by_hand("llama", model, [posterior.draw(k) for k in range(2)], split, tokenizer)
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_where_b_alone_does_not_make_the_base_it_has_a_pass_of_its_own(tokenizer, lora):
    model, split = make_model(**lora), rows()
    posterior = wide(model)
    found = bl.prompt_likelihood_ratio(model, posterior, split, 2, tokenizer=tokenizer)
    wanted = by_hand("llama", model, [posterior.draw(k) for k in range(2)], split, tokenizer)
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_members_are_averaged_and_scalings_and_answer_noise_leave_prompts_as_they_are(tokenizer):
    model, split = make_model(), rows()
    posterior = wide(model)

    def ratio(of, draws=2):
        return bl.prompt_likelihood_ratio(model, of, split, draws, tokenizer=tokenizer)

    both = Mixture((posterior, Point(read(model))))
    wanted = by_hand("llama", model, [both.draw(0), both.draw(1)], split, tokenizer)
    torch.testing.assert_close(ratio(both), wanted, **CLOSE)
    numbers = {
        f"{of}.{part}": torch.tensor([v]) for of in ("draws", "mean") for part, v in (("weight", 3.0), ("bias", 0.0))
    }
    torch.testing.assert_close(ratio(Scaled(posterior, numbers)), ratio(posterior))
    torch.testing.assert_close(ratio(bl.restricted(posterior, tokens="answer")), ratio(posterior, 0))
    torch.testing.assert_close(
        ratio(bl.restricted(posterior, 1)),
        by_hand("llama", model, [bl.restricted(posterior, 1).draw(k) for k in range(2)], split, tokenizer),
        **CLOSE,
    )


def test_a_model_that_was_not_tuned_has_ratios_of_zero(tokenizer):
    model = make_model()
    untuned = Point({n: torch.zeros_like(v) if "lora_B" in n else v for n, v in read(model).items()})
    found = bl.prompt_likelihood_ratio(model, untuned, rows(), tokenizer=tokenizer)
    torch.testing.assert_close(found, torch.zeros(6), rtol=0, atol=1e-6)


def test_what_has_no_ratio_is_refused_in_one_sentence(tokenizer):
    model, split = make_model(), rows()
    encoder = make_model("bert")
    texts = make_split("test", 3, 2, classes=True)
    with pytest.raises(InputError, match="a classification head does not say how likely a prompt is; use a causal"):
        bl.prompt_likelihood_ratio(encoder, gaussian(encoder), texts, tokenizer=tokenizer)
    with pytest.raises(InputError, match="are not weights"):
        bl.prompt_likelihood_ratio(model, TokenDropout(read(model), 0.1), split, tokenizer=tokenizer)
    changed = make_model(init_lora_weights="olora")
    with pytest.raises(InputError, match="has changed the base's weights"):
        bl.prompt_likelihood_ratio(changed, gaussian(changed), split, tokenizer=tokenizer)
    one = Split("short", (Example("red", ("blue", "green"), 0),), Format("{text}", "likelihood"))
    with pytest.raises(InputError, match="row 0 of short has a prompt of one token"):
        bl.prompt_likelihood_ratio(model, gaussian(model), one, tokenizer=tokenizer)
