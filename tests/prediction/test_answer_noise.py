"""Noise on the answer's tokens only: what all verbs give is what layers give whose adapter depends on the position."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import Linear
from support.preferences import TEXTS, reward_model
from support.serving import served
from support.tiny import KINDS, gaussian, make_model, same_state, state_of

import bayeslora as bl
from bayeslora.errors import InputError
from bayeslora.integrations.server.batching import ContinuousGroup, Seat
from bayeslora.integrations.server.decoding import Generation, Row
from bayeslora.params import lora_parameters, read, swapped
from bayeslora.posteriors import AnswerNoise, DiagonalGaussian, Linearised, Mixture, Point, Scaled
from bayeslora.posteriors.loading import export_draws
from bayeslora.prediction import PassOptions, predict
from bayeslora.prediction.likelihoods import Likelihoods
from bayeslora.prediction.readouts import readout_for
from bayeslora.prediction.rewards import predict_rewards
from bayeslora.tasks.types import Format, Split

DRAWS = 3
CAUSAL = [name for name, kind in KINDS.items() if kind.model != "bert"]


def noisy(model, variance=0.04):
    """A posterior whose noise is large enough to tell, and the same on the answer's tokens only."""
    mean = read(model)
    posterior = DiagonalGaussian(mean, {name: torch.full_like(value, variance) for name, value in mean.items()})
    return posterior, bl.restricted(posterior, tokens="answer")


@contextmanager
def by_position(model, mean, draw, start):
    """Give the adapted layers one adapter for the tokens before a place in the sequence, another from there on."""
    names = {id(p): name for name, p in lora_parameters(model).items()}
    handles = []

    def mixed(layer, args, output):
        (name,) = layer.lora_A
        x = args[0].to(layer.lora_A[name].weight.dtype)
        parts = []
        for params in (mean, draw):
            a, b = (params[names[id(part[name].weight)]] for part in (layer.lora_A, layer.lora_B))
            parts.append((x @ a.T @ b.T * layer.scaling[name]).to(output.dtype))
        late = torch.arange(x.shape[1])[:, None] >= start
        return layer.base_layer(args[0]) + torch.where(late, parts[1], parts[0])

    for layer in model.modules():
        if isinstance(layer, Linear):
            handles.append(layer.register_forward_hook(mixed))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits_of(model, posterior, number, ids, start):
    """The logits [T V] of one sequence, or of a head, under one draw from a place on."""
    draw = posterior.draw(number)
    with swapped(model, draw), by_position(model, posterior.mean, draw, start):  # a head is at the last token only
        return model.eval()(input_ids=torch.tensor([ids])).logits[0].float()


def answer_by_position(model, posterior, number, row):
    """One draw's log-probabilities of a row's choices."""
    sums = []
    for answer in row.answers:
        log_p = logits_of(model, posterior, number, [*row.prompt, *answer[:-1]], len(row.prompt) - 1).log_softmax(-1)
        sums.append(sum(log_p[len(row.prompt) - 1 + t, token] for t, token in enumerate(answer)))
    return (torch.stack(sums) * torch.tensor(row.scales or [1.0] * len(sums))).log_softmax(-1)


@pytest.mark.parametrize("name", CAUSAL)
def test_answers_are_those_of_layers_that_know_the_position(name, tokenizer):
    kind = KINDS[name]
    model, split = kind.build(), kind.task().test
    posterior, answer = noisy(model)
    before = state_of(model)
    usual = {"draws": DRAWS, "tokenizer": tokenizer}
    found = predict(model, answer, split, **usual)
    assert same_state(model, before)
    full = predict(model, posterior, split, **usual)
    close = {"rtol": 1e-4, "atol": 1e-4} if kind.dtype == torch.float32 else {"rtol": 0, "atol": 0.01}
    torch.testing.assert_close(found.mean_log_probs, full.mean_log_probs, **close)
    rows, _ = readout_for(model, split, tokenizer).encode(split)
    for number in range(DRAWS):
        for row, log_p in zip(rows[:5], found.log_probs[number], strict=False):
            wanted = answer_by_position(model, posterior, number, row)
            torch.testing.assert_close(log_p[: len(wanted)], wanted, **close)
    finite = torch.isfinite(full.log_probs)
    assert float((found.log_probs - full.log_probs)[finite].abs().max()) > 0.05  # and it is something else


def instructed(split):
    """The same examples after a long instruction."""
    words = "Question: red holds 1 blue, old gold holds 2 dark green, pale red holds 3 blue. Answer: green.\n"
    return replace(split, examples=tuple(replace(e, text=words + e.text) for e in split))


@pytest.mark.parametrize("readout", ["letters", "likelihood"])
def test_batches_and_what_passes_once_change_no_answer(readout, tokenizer):
    kind = KINDS[f"llama-{readout}"]
    model, split = kind.build(), instructed(kind.task().test)
    _, answer = noisy(model)
    passed = []
    layers = model.get_base_model().model
    hook = layers.register_forward_hook(lambda _, args, kwargs, __: passed.append(kwargs["input_ids"].numel()),
                                        with_kwargs=True)  # fmt: skip

    def ask(**changes):
        """The answers, and the tokens that passed through the layers' entrance, each draw's for itself."""
        usual = {"draws": 4, "tokenizer": tokenizer, "mean": False}
        predict(model, answer, split, **usual | changes)  # with the trials
        passed.clear()
        return predict(model, answer, split, **usual | changes).log_probs, sum(passed)

    found, tokens = ask()
    for changes in (
        {"token_budget": 60},
        {"options": PassOptions(stack=False)},
        {"options": PassOptions(share_prefix=False)},
    ):
        torch.testing.assert_close(ask(**changes)[0], found, rtol=1e-4, atol=1e-4)
    hook.remove()
    lengths = [len(row.prompt) for row in readout_for(model, split, tokenizer).encode(split)[0]]
    assert tokens < sum(lengths)  # the instruction passed once, prompts for one draw


def test_a_generated_text_and_the_server_go_on_from_the_prompt(tokenizer):
    model = make_model("llama")
    model.get_base_model().generation_config.eos_token_id = None
    posterior, answer = noisy(model)
    prompts = ["Question: bag holds 3 red, 5 blue", "Answer"]
    usual = {"tokenizer": tokenizer, "max_new_tokens": 6}
    texts = bl.generate(model, answer, prompts, DRAWS, **usual)
    together = bl.generate_each(model, answer, prompts, DRAWS, num_return_sequences=2, do_sample=True, **usual)
    beams = bl.generate(model, answer, prompts, DRAWS, num_beams=3, **usual)
    what = replace(served(tokenizer, model=model), posterior=answer)
    group = ContinuousGroup(what, ("tiny", DRAWS), 8)
    rows = [Row(tokenizer(p)["input_ids"], 6, 0.0, 1.0, 0, ()) for p in prompts]
    seats = [Seat(row, Generation("tiny", DRAWS, rows)) for row in rows]
    group.turn(lambda: [seats.pop()] if seats else [], lambda _: False, lambda: True)
    for prompt, text, each, beam, row in zip(prompts, texts, together, beams, rows, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        for found in (text, beam, *each.answers):
            own = {k: logits_of(model, posterior, k, [*ids, *found.token_ids], len(ids) - 1) for k in range(DRAWS)}
            log_p = torch.stack(list(own.values())).log_softmax(-1)[:, len(ids) - 1 : -1]
            chosen = torch.tensor(found.token_ids)[:, None].expand(DRAWS, -1, -1)
            wanted = log_p.gather(2, chosen)[..., 0]
            if found in each.answers:
                wanted = wanted[each.draws[each.answers.index(found)]][None]
            torch.testing.assert_close(found.draw_log_probs, wanted, rtol=1e-4, atol=1e-4)
        assert tuple(note.id for note in row.notes) == text.token_ids
        log_probs = torch.tensor([note.log_prob for note in row.notes])
        torch.testing.assert_close(log_probs, text.log_probs, rtol=1e-4, atol=1e-4)


def test_texts_after_contexts_and_rewards(tokenizer):
    model = make_model("llama")
    posterior, answer = noisy(model)
    readout = readout_for(model, Split("texts", (), Format("", "likelihood")), tokenizer)
    pairs = [(tokenizer(a)["input_ids"], tokenizer(b)["input_ids"]) for a, b in
             (("bag holds 3 red", " blue, 4 green"), ("Answer", " red"), ("bag holds 3 red", " old gold"))]  # fmt: skip
    draws = [posterior.draw(k) for k in range(DRAWS)]
    found, _ = Likelihoods(model, draws, readout, 200, answer.before_answer).of(pairs, lambda count: None)
    for number in range(DRAWS):
        for pair, (context, text) in enumerate(pairs):
            log_p = logits_of(model, posterior, number, [*context, *text], len(context) - 1).log_softmax(-1)
            wanted = sum(float(log_p[len(context) - 1 + t, token]) for t, token in enumerate(text))
            assert float(found[number, pair]) == pytest.approx(wanted, abs=1e-3)
    model = reward_model()
    posterior, answer = noisy(model)
    rewards = predict_rewards(model, answer, TEXTS, DRAWS, tokenizer=tokenizer)
    for number in range(DRAWS):
        for text, reward in zip(TEXTS, rewards[number], strict=True):
            ids = tokenizer(text + tokenizer.eos_token)["input_ids"]
            wanted = logits_of(model, posterior, number, ids, len(ids) - 1)
            torch.testing.assert_close(reward, wanted[0], rtol=1e-4, atol=1e-4)


def test_what_is_made_of_it(tokenizer, tmp_path):
    model = make_model("llama")
    posterior = gaussian(model)
    answer = bl.restricted(posterior, tokens="answer")
    assert bl.restricted(answer, tokens="answer") is answer
    one = {f"{of}.{part}": torch.ones(1) for of in ("draws", "mean") for part in ("weight", "bias")}
    scaled = bl.restricted(Scaled(posterior, one), tokens="answer")
    assert isinstance(scaled, Scaled)
    assert scaled.before_answer is answer.mean
    assert isinstance(scaled.unscaled, AnswerNoise)
    last = bl.restricted(posterior, 1, tokens="answer")
    assert any(bool((v == 0).all()) for v in last.standard_deviation().values())
    tempered = bl.tempered(answer, 4)
    assert isinstance(tempered, AnswerNoise)
    assert tempered.standard_deviation().keys() == posterior.variance.keys()
    answer.save_pretrained(tmp_path / "saved")
    again = bl.load_posterior(tmp_path / "saved")
    assert isinstance(again, AnswerNoise)
    assert torch.equal(*(p.draw(1)[next(iter(p.mean))] for p in (again, answer)))
    what = replace(served(tokenizer), posterior=answer)
    assert what.names == ["tiny", "tiny/mean"]
    bert = make_model("bert")
    for refused, reason in (
        (lambda: export_draws(answer, tmp_path / "adapters", 2), "is no adapter"),
        (lambda: bl.restricted(posterior, tokens="last"), "'all' or 'answer'"),
        (lambda: bl.restricted(Linearised(posterior), tokens="answer"), "draws are no weights"),
        (lambda: Mixture((answer, Point(posterior.mean))), "restrict the mixture"),
        (lambda: predict(bert, noisy(bert)[1], KINDS["bert"].task().test, 2, tokenizer=tokenizer), "causal"),
    ):
        with pytest.raises(InputError, match=reason):
            refused()
    with swapped(model, posterior.mean):
        split = KINDS["llama-letters"].task().test
        mean = predict(model, answer, split, 0, tokenizer=tokenizer)
        point = predict(model, bl.restricted(Point(posterior.mean), tokens="answer"), split, tokenizer=tokenizer)
    torch.testing.assert_close(mean.log_probs, point.log_probs)
