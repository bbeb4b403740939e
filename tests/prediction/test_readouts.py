"""Every way of reading an answer against a plain loop over full logits."""

from dataclasses import replace

import pytest
import torch
from support.tiny import (
    CHECKPOINTING,
    COLOURS,
    KINDS,
    arguments,
    make_model,
    make_split,
    make_task,
    same_params,
    same_state,
    state_of,
)
from torch import nn
from torch.nn import functional
from transformers import TrainerCallback

from bayeslora.methods import Map
from bayeslora.params import lora_parameters, read
from bayeslora.posteriors import Point
from bayeslora.prediction import predict, readout_for
from bayeslora.prediction.generation import generate
from bayeslora.tasks.templates import answer_text, render, resolve_format
from bayeslora.training.run import fit

LANGUAGE_MODELS = ("llama", "qwen2", "gpt2")
EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=LANGUAGE_MODELS)
def model(request):
    return make_model(request.param).eval()


def split_of(readout, rows=9):
    return make_split("test", rows, 5, classes=False, readout=readout)


def plain_loop(model, split, tokenizer, readout):
    """One sequence at a time: the sum of each choice's token log-probabilities, from full logits."""
    form = resolve_format(split.format, readout)
    found = []
    for example in split:
        prompt = render(example, form)
        start = len(tokenizer(prompt)["input_ids"])
        scores = []
        for choice in range(len(example.choices)):
            ids = torch.tensor([tokenizer(prompt + answer_text(example, choice, readout))["input_ids"]])
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
            scores.append(sum(log_p[t - 1, ids[0, t]] for t in range(start, ids.shape[1])))
        found.append(torch.stack(scores).log_softmax(0))
    return found


def batched(model, readout, split):
    """All examples in one batch."""
    batch = readout.collate(readout.encode(split)[0])
    with readout.attached(model):
        return model(**batch).logits.log_softmax(-1)


def assert_rows(found, wanted):
    assert found.shape == (len(wanted), max(map(len, wanted)))
    for row, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(row[: len(want)], want, **EXACT)
        assert (row[len(want) :] == -torch.inf).all()  # choices that an example does not have


@torch.no_grad()
def test_shared_prompts_separate_sequences_and_a_plain_loop_agree(model, tokenizer):
    split = split_of("likelihood")
    readout = readout_for(model, split, tokenizer)
    assert readout.shared
    assert {len(e.choices) for e in split} == {3, 4}
    assert len({len(answer) for row in readout.encode(split)[0] for answer in row.answers}) == 3
    wanted = plain_loop(model, split, tokenizer, "likelihood")
    assert_rows(batched(model, readout, split), wanted)
    assert_rows(batched(model, replace(readout, shared=False), split), wanted)


@torch.no_grad()
def test_choices_of_one_token_agree_with_a_plain_loop(model, tokenizer):
    split = split_of("likelihood")
    single = replace(split, examples=tuple(replace(e, choices=("red", "blue", "gold")) for e in split))
    wanted = plain_loop(model, single, tokenizer, "likelihood")
    assert_rows(batched(model, readout_for(model, single, tokenizer), single), wanted)


@torch.no_grad()
def test_letters_are_the_letters_rows_of_full_logits_at_the_last_position(model, tokenizer):
    split = split_of("letters")
    readout = readout_for(model, split, tokenizer)
    rows, _ = readout.encode(split)
    with readout.attached(model):
        found = model(**readout.collate(rows)).logits
    for example, row, logits in zip(split, rows, found, strict=True):
        letters = [tokenizer(" " + "ABCD"[c])["input_ids"][0] for c in range(len(example.choices))]
        full = model(input_ids=torch.tensor([row.prompt])).logits[0, -1, letters]
        torch.testing.assert_close(logits[: len(letters)], full, **EXACT)
    assert_rows(found.log_softmax(-1), plain_loop(model, split, tokenizer, "letters"))


@torch.no_grad()
@pytest.mark.parametrize("readout_name", ["letters", "likelihood"])
def test_neither_padding_nor_company_matters(model, tokenizer, readout_name):
    split = split_of(readout_name)
    readout = readout_for(model, split, tokenizer)
    together = batched(model, readout, split)
    for i in range(len(split)):
        alone = batched(model, readout, split.take([i]))[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, **EXACT)


@torch.no_grad()
def test_padding_does_not_matter_to_a_classification_head(tokenizer):
    model, split = KINDS["bert"].build().eval(), KINDS["bert"].task().test
    readout = readout_for(model, split, tokenizer)
    together = batched(model, readout, split)
    assert len({len(row.prompt) for row in readout.encode(split)[0]}) > 1
    for i in range(len(split)):
        ids = torch.tensor([tokenizer(split.examples[i].text)["input_ids"]])
        torch.testing.assert_close(together[i], model(input_ids=ids).logits[0].log_softmax(-1), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_token_budget_changes_nothing(kind, tokenizer):
    model, split = KINDS[kind].build(), KINDS[kind].task().test
    found = [
        predict(model, Point(read(model)), split, tokenizer=tokenizer, token_budget=n).log_probs for n in (1, 70, 10**6)
    ]
    # a bf16 forward rounds to 8 bits, 2⁻⁸ of logits of a size about 1, and differently in batches of different shapes
    exact = EXACT if KINDS[kind].dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-5}
    torch.testing.assert_close(found[1], found[0], **exact)
    torch.testing.assert_close(found[2], found[0], **exact)


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
def test_the_head_sees_the_positions_that_are_asked_for_and_no_others(model, tokenizer, shared):
    split = split_of("likelihood")
    readout = replace(readout_for(model, split, tokenizer), shared=shared)
    rows, _ = readout.encode(split)
    seen = []
    head = model.get_base_model().get_output_embeddings()
    handle = head.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[:-1].numel()))
    batch = readout.collate(rows)
    with readout.attached(model):
        model(**batch)
    handle.remove()
    later = sum(len(answer) - 1 for row in rows for answer in row.answers)
    prompts = len(rows) if shared else sum(len(row.answers) for row in rows)
    assert seen == [prompts + later]
    assert seen[0] < batch["input_ids"].numel() / 2


@pytest.mark.parametrize("readout_name", ["letters", "likelihood"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_the_one_of_the_plain_loop(model, tokenizer, readout_name, checkpointing):
    split = split_of(readout_name)
    readout = readout_for(model, split, tokenizer)
    if checkpointing:
        getattr(model, f"{CHECKPOINTING}_enable")(**{f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}})
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    functional.nll_loss(batched(model, readout, split), split.labels).backward()
    found = {name: p.grad.clone() for name, p in lora_parameters(model).items()}
    model.zero_grad()
    if checkpointing:
        getattr(model, f"{CHECKPOINTING}_disable")()
    plain = plain_loop(model, split, tokenizer, readout_name)
    (-sum(row[label] for row, label in zip(plain, split.labels, strict=True)) / len(plain)).backward()
    for name, p in lora_parameters(model).items():
        torch.testing.assert_close(found[name], p.grad, **EXACT)
        assert p.grad.abs().max() > 1e-4


def test_attaching_a_readout_leaves_no_trace(model, tokenizer):
    before = state_of(model)
    readout = readout_for(model, split_of("likelihood"), tokenizer)
    with pytest.raises(ZeroDivisionError), readout.attached(model):
        raise ZeroDivisionError
    assert same_state(model, before)
    ids = torch.arange(3, 12)[None]
    assert model(input_ids=ids).logits.shape == (1, 9, 80)


@pytest.mark.parametrize("readout_name", ["letters", "likelihood"])
def test_a_callback_may_predict_and_generate_while_the_model_trains(readout_name, tokenizer, tmp_path):
    task = make_task(readout=readout_name)
    seen = []

    class Watching(TrainerCallback):
        """Predicts and generates after every epoch."""

        def on_epoch_end(self, args, state, control, **kwargs):
            """Predict and generate."""
            here = Point(read(kwargs["model"]))
            answers = predict(kwargs["model"], here, task.test, 1, tokenizer=tokenizer)
            text = generate(kwargs["model"], here, ["Question"], 1, tokenizer=tokenizer, max_new_tokens=3)
            seen.append((answers.log_p, text[0].token_ids))

    plain = fit(make_model(), task, Map(), arguments(tmp_path / "plain"), tokenizer=tokenizer)
    model = make_model()
    watched = fit(model, task, Map(), arguments(tmp_path / "w"), tokenizer=tokenizer, callbacks=[Watching()])
    assert same_params(watched.mean, plain.mean)
    answers = predict(model, watched, task.test, 1, tokenizer=tokenizer)
    text = generate(model, watched, ["Question"], 1, tokenizer=tokenizer, max_new_tokens=3)
    torch.testing.assert_close(seen[-1][0], answers.log_p)
    assert seen[-1][1] == text[0].token_ids


def test_sharing_is_left_to_attention_that_takes_a_mask(model, tokenizer):
    model.get_base_model().config._attn_implementation = "flash_attention_2"
    assert not readout_for(model, split_of("likelihood"), tokenizer).shared


@torch.no_grad()
def test_eager_attention_agrees_with_the_plain_loop(tokenizer):
    model, split = make_model("llama").eval(), split_of("likelihood")
    wanted = plain_loop(model, split, tokenizer, "likelihood")
    model.get_base_model().set_attn_implementation("eager")
    readout = readout_for(model, split, tokenizer)
    assert readout.shared
    assert_rows(batched(model, readout, split), wanted)


def test_a_prompt_that_is_cut_loses_its_beginning_and_is_counted(model, tokenizer):
    split = split_of("likelihood")
    cut = replace(split, format=replace(split.format, max_length=16))
    rows, count = readout_for(model, cut, tokenizer).encode(cut)
    whole, none = readout_for(model, split, tokenizer).encode(split)
    assert none == 0
    assert count == sum(len(row.prompt) > 16 for row in whole) > 0
    assert all(
        short.prompt == row.prompt[-16:] and short.answers == row.answers
        for short, row in zip(rows, whole, strict=True)
    )
    assert predict(model, Point(read(model)), cut, tokenizer=tokenizer).truncated == count


def test_answers_are_tokenised_as_they_follow_the_prompt(model, tokenizer):
    split = split_of("likelihood")
    row = readout_for(model, split, tokenizer).encode(split)[0][0]
    assert ["".join(tokenizer.convert_ids_to_tokens(list(answer))) for answer in row.answers] == [
        " " + colour for colour in COLOURS[: len(row.answers)]
    ]
