"""The likelihood readout's normalisations: by hand, in every way of running them, in training as in prediction."""

from dataclasses import replace

import pytest
import torch
from support.tiny import arguments, gaussian, make_model, make_split, make_task
from torch.nn import functional

from bayeslora.errors import InputError
from bayeslora.methods import Ensemble, Laplace, Map
from bayeslora.params import lora_parameters, read, swapped
from bayeslora.posteriors import Draws, Point
from bayeslora.prediction import PassOptions, predict, readout_for
from bayeslora.prediction.jacobians import differentiated, linear_sites
from bayeslora.prediction.passes import batched
from bayeslora.tasks.templates import answer_text, neutral_prompt, render, resolve_format
from bayeslora.tasks.types import Format, Task
from bayeslora.training.run import fit

EVERY = ("sum", "characters", "tokens", "unconditional")
EXACT = {"rtol": 1e-5, "atol": 1e-5}


def normalised(source, kind):
    return replace(source, format=replace(source.format, normalisation=kind))


def split_of(kind, rows=9):
    return normalised(make_split("test", rows, 5, classes=False, readout="likelihood"), kind)


def task_of(kind):
    found = make_task(readout="likelihood")
    return Task("bags", *(normalised(s, kind) for s in (found.train, found.validation, found.test) if s is not None))


def log_likelihood(model, tokenizer, prompt, answer):
    """One sequence: the sum of the answer's token log-probabilities from full logits, and how many tokens it has."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
    log_p = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum((log_p[t - 1, ids[0, t]] for t in range(start, ids.shape[1])), torch.tensor(0.0)), ids.shape[1] - start


def by_hand(model, split, tokenizer):
    """Each example's log-probabilities by the definition of its normalisation."""
    form, found = resolve_format(split.format, "likelihood"), []
    for example in split:
        texts = [answer_text(example, c, "likelihood") for c in range(len(example.choices))]
        sums, tokens = zip(*(log_likelihood(model, tokenizer, render(example, form), t) for t in texts), strict=True)
        characters = [len(choice) for choice in example.choices]
        match form.normalisation:
            case "characters":
                scores = [s * 4 / n for s, n in zip(sums, characters, strict=True)]
            case "tokens":
                scores = [s / n for s, n in zip(sums, tokens, strict=True)]
            case "unconditional":
                pairs = zip(sums, texts, strict=True)
                scores = [s - log_likelihood(model, tokenizer, "Answer:", t)[0] for s, t in pairs]
            case _:
                scores = list(sums)
        found.append(torch.stack(scores).log_softmax(0))
    return found


def assert_rows(found, wanted):
    for row, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(row[: len(want)], want, **EXACT)
        assert (row[len(want) :] == -torch.inf).all()


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", EVERY)
def test_training_scores_are_those_by_hand_with_shared_prompts_and_without(kind, architecture, tokenizer):
    model, split = make_model(architecture).eval(), split_of(kind)
    readout = readout_for(model, split, tokenizer)
    wanted = by_hand(model, split, tokenizer)
    assert readout.shared
    for own in (readout, replace(readout, shared=False)):
        batch = own.collate(own.encode(split)[0])
        lengths = [own.length(row) for row in own.encode(split)[0]]
        assert batch["input_ids"].numel() >= sum(lengths) * (1 if own.shared else 0)
        with own.attached(model):
            assert_rows(model(**batch).logits.log_softmax(-1), wanted)
    plain = by_hand(model, split_of("sum"), tokenizer)
    assert kind == "sum" or max(float((a - b).abs().max()) for a, b in zip(wanted, plain, strict=True)) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", EVERY)
def test_choices_of_one_token_are_normalised_by_hand_too(kind, tokenizer):
    model, split = make_model().eval(), split_of(kind)
    single = replace(split, examples=tuple(replace(e, choices=("red", "blue", "green")) for e in split))
    readout = readout_for(model, single, tokenizer)
    with readout.attached(model):
        found = model(**readout.collate(readout.encode(single)[0])).logits.log_softmax(-1)
    assert_rows(found, by_hand(model, single, tokenizer))
    assert_rows(
        predict(model, Point(read(model)), single, tokenizer=tokenizer).log_p, by_hand(model, single, tokenizer)
    )


@torch.no_grad()
@pytest.mark.parametrize("budget", [1, 70, 4000])
@pytest.mark.parametrize("kind", EVERY)
def test_prediction_has_the_training_scores_under_stacked_draws_as_in_a_loop(kind, budget, tokenizer):
    model, split = make_model().eval(), split_of(kind)
    posterior = gaussian(model)
    usual = {"draws": Draws(3, seed=4), "tokenizer": tokenizer, "token_budget": budget}
    stacked = predict(model, posterior, split, **usual)
    loop = predict(model, posterior, split, options=PassOptions(stack=False), **usual)
    torch.testing.assert_close(stacked.log_probs, loop.log_probs, **EXACT)
    for k in range(3):
        with swapped(model, posterior.draw(k, 4)):
            assert_rows(stacked.log_probs[k], by_hand(model, split, tokenizer))
    assert_rows(stacked.mean_log_probs, by_hand(model, split, tokenizer))


@pytest.mark.parametrize("kind", EVERY)
def test_a_beginning_that_is_run_once_changes_no_normalised_score(kind, tokenizer):
    model, split = make_model().eval(), split_of(kind)
    told = "Question: red holds 1 blue, old gold holds 2 dark green, pale red holds 3 blue. Answer: green.\n"
    long = replace(split, examples=tuple(replace(e, text=told + e.text) for e in split))
    usual = {"draws": Draws(3, seed=4), "tokenizer": tokenizer}
    once = predict(model, gaussian(model), long, **usual)
    whole = predict(model, gaussian(model), long, options=PassOptions(share_prefix=False), **usual)
    torch.testing.assert_close(once.log_probs, whole.log_probs, rtol=0, atol=2e-5)


def test_the_neutral_prompt_is_passed_once_for_each_different_choice_and_draw(tokenizer):
    model, split = make_model().eval(), split_of("unconditional", rows=24)
    posterior, usual = gaussian(model), {"tokenizer": tokenizer, "mean": False, "token_budget": 60}
    for kind in EVERY:  # the trials
        predict(model, posterior, normalised(split, kind), 3, **usual)
    spent = {}
    for kind in ("sum", "unconditional"):
        counts = []
        head = model.get_base_model().get_output_embeddings()
        hook = head.register_forward_hook(lambda _m, _i, out, counts=counts: counts.append(out.shape[0]))
        predict(model, posterior, normalised(split, kind), 3, **usual)
        hook.remove()
        spent[kind] = sum(counts)
    choices = {choice for example in split for choice in example.choices}
    tokens = sum(len(tokenizer(" " + choice)["input_ids"]) for choice in choices)
    assert len(choices) == 4 < sum(len(example.choices) for example in split)
    # three draws: the neutral prompt's last position, and every token of a choice but its first
    assert spent["unconditional"] - spent["sum"] == 3 * (1 + tokens - len(choices))


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("shared", [True, False])
def test_the_gradient_is_that_of_the_scores_by_hand(kind, shared, tokenizer):
    model, split = make_model().eval(), split_of(kind)
    readout = replace(readout_for(model, split, tokenizer), shared=shared)
    with readout.attached(model):
        logits = model(**readout.collate(readout.encode(split)[0])).logits
    functional.cross_entropy(logits, split.labels).backward()
    found = {name: p.grad.clone() for name, p in lora_parameters(model).items()}
    model.zero_grad()
    plain = by_hand(model, split, tokenizer)
    (-sum(row[label] for row, label in zip(plain, split.labels, strict=True)) / len(plain)).backward()
    for name, p in lora_parameters(model).items():
        torch.testing.assert_close(found[name], p.grad, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
def test_training_minimises_the_normalised_loss(kind, tokenizer, tmp_path):
    task = task_of(kind)
    model = make_model()

    def loss():
        rows = zip(by_hand(model.eval(), task.train, tokenizer), task.train.labels, strict=True)
        return float(-sum(row[label] for row, label in rows)) / len(task.train)

    before = loss()
    fit(model, task, Map(), arguments(tmp_path, max_steps=30), tokenizer=tokenizer)
    assert loss() < before - 0.04


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("shared", [True, False])
def test_jacobians_are_those_of_the_normalised_scores(kind, shared, tokenizer):
    model, split = make_model().eval(), split_of(kind, rows=3)
    readout = replace(readout_for(model, split, tokenizer), shared=shared)
    rows = readout.encode(split)[0]
    sites = linear_sites(model, lambda name: True)
    with readout.attached(model):
        for order, batch in batched(model, readout, rows, 10**6):
            with differentiated(model, sites) as passed:
                found = passed(batch).along()
            alone = [model(**readout.collate([rows[i]])).logits[0] for i in order]
        for place, logits in enumerate(alone):
            for c in range(len(logits)):
                grads = torch.autograd.grad(
                    logits[c], [lora_parameters(model)[s.name] for s in sites], retain_graph=True
                )
                for site, grad in zip(sites, grads, strict=True):
                    torch.testing.assert_close(found.jacobian(site)[c, place].reshape(grad.shape), grad, **EXACT)


def test_laplace_takes_every_normalisation(tokenizer, tmp_path):
    for kind in EVERY:
        task, model = task_of(kind), make_model()
        posterior = fit(model, task, Laplace(prior=10.0), arguments(tmp_path, max_steps=2), tokenizer=tokenizer)
        found = predict(model, posterior, task.test, tokenizer=tokenizer)
        wanted = by_hand(model.eval(), task.test, tokenizer)
        assert_rows(found.mean_log_probs, wanted)


@pytest.mark.parametrize("kind", ["characters", "unconditional"])
def test_members_trained_together_are_those_of_separate_runs(kind, tokenizer, tmp_path):
    task, found = task_of(kind), []
    for together in (False, True):
        method = Ensemble(member=Map(), members=2, together=together)
        args = arguments(tmp_path / str(together), max_steps=3)
        found.append(fit(make_model(), task, method, args, tokenizer=tokenizer))
    for one, other in zip(found[0].members, found[1].members, strict=True):
        for name, value in one.mean.items():
            torch.testing.assert_close(other.mean[name], value, rtol=1e-3, atol=1e-4)


def test_the_neutral_prompt_is_what_the_template_ends_with():
    assert neutral_prompt(resolve_format(Format(""), "likelihood")) == "Answer:"
    assert neutral_prompt(resolve_format(Format("", kind="class"), "likelihood")) == "Label:"
    assert neutral_prompt(Format("{text} It {{is}}")) == "It {is}"
    assert neutral_prompt(Format("{text}")) == "Answer:"


@pytest.mark.parametrize("readout", ["letters", "head"])
def test_other_readouts_have_no_normalisation(readout):
    with pytest.raises(InputError, match="normalisation 'tokens': use readout='likelihood'"):
        resolve_format(Format("", readout, normalisation="tokens"), readout)
    assert resolve_format(Format("", normalisation="tokens"), readout).normalisation == "sum"
