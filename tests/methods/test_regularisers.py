"""The loss, its regularisers, and the ensemble's mutual information against values worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from support.tiny import KINDS, arguments, make_model, make_task, same_params, same_state, state_of
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from bayeslora.errors import InputError
from bayeslora.methods import Map
from bayeslora.methods.regularisers import DecoupledDecay, KlToBase, answer_loss
from bayeslora.params import lora_parameters, read
from bayeslora.posteriors import Mixture, Point
from bayeslora.prediction import predict, readout_for
from bayeslora.training.run import fit


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_loss_over_choices_is_the_mean_cross_entropy():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, -math.inf]])
    loss = answer_loss({"logits": logits}, torch.tensor([1, 0]))
    assert loss.item() == pytest.approx((-math.log(0.75) - math.log(1.0)) / 2, abs=1e-7)


def test_the_loss_over_choices_is_divided_by_the_items_of_the_whole_batch():
    logits, labels = normal(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    parts = [answer_loss({"logits": logits[i : i + 2]}, labels[i : i + 2], 6) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), answer_loss({"logits": logits}, labels), rtol=1e-6, atol=0)


def test_the_loss_of_a_language_model_is_the_one_of_transformers():
    model = make_model("llama").eval()
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = labels[2, 7:] = -100
    out = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(answer_loss(out, labels), out.loss, rtol=1e-6, atol=0)


@pytest.fixture
def batch(tokenizer):
    """A model with its readout attached, and one batch."""

    def make(kind):
        model, task = KINDS[kind].build(), KINDS[kind].task()
        readout = readout_for(model, task.train, tokenizer)
        return model, readout, readout.collate(readout.encode(task.train)[0][:6])

    return make


def kl_of(model, readout, inputs, weight, items=None):
    """Run one training batch as the Trainer would; return outputs, loss, and the callback's loss."""
    callback, moment = KlToBase(weight), (arguments("unused"), TrainerState(), TrainerControl())
    labels = inputs["labels"]
    with readout.attached(model):
        callback.on_train_begin(*moment, model=model)
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        loss = callback.loss(outputs, labels, items)
        callback.on_train_end(*moment, model=model)
    return outputs.logits, loss


@pytest.mark.parametrize("kind", ["llama-letters", "llama-likelihood", "qwen2", "gpt2"])
def test_the_kl_term_is_the_divergence_from_the_model_without_its_adapter(kind, batch):
    model, readout, inputs = batch(kind)
    ours, loss = kl_of(model, readout, inputs, 0.7)
    model.eval()  # the base answers without dropout
    with torch.no_grad(), readout.attached(model), model.disable_adapter():
        base = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    by_hand = 0.0
    for row, (p_row, q_row) in enumerate(zip(ours.detach().double(), base.double(), strict=True)):
        p, q = torch.exp(p_row - p_row.logsumexp(0)), torch.exp(q_row - q_row.logsumexp(0))
        by_hand -= math.log(p[inputs["labels"][row]])
        by_hand += 0.7 * sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > 0)
    assert loss.item() == pytest.approx(by_hand / len(ours), rel=1e-5)
    assert loss.item() > answer_loss({"logits": ours}, inputs["labels"]).item()


def test_the_kl_terms_gradient_is_the_one_of_its_formula(batch):
    model, readout, inputs = batch("llama-likelihood")
    (found := kl_of(model, readout, inputs, 0.7)[1]).backward()
    got = {n: p.grad.clone() for n, p in lora_parameters(model).items()}
    model.zero_grad()
    plain = {k: v for k, v in inputs.items() if k != "labels"}
    with readout.attached(model):
        with torch.no_grad(), model.disable_adapter():
            log_q = model(**plain).logits.log_softmax(-1)
        logits = model(**plain).logits
        there = torch.isfinite(logits)
        log_p = logits.log_softmax(-1)
        gap = torch.where(there, log_p, 0.0) - torch.where(there, log_q, 0.0)
        wanted = functional.cross_entropy(logits, inputs["labels"])
        wanted = wanted + 0.7 * (torch.where(there, log_p, -1e30).exp() * gap).sum() / len(logits)
        wanted.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    for name, p in lora_parameters(model).items():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-7)


def test_the_kl_term_is_zero_when_b_is_zero(batch):
    model, readout, inputs = batch("llama-likelihood")
    with torch.no_grad():
        for name, p in lora_parameters(model).items():
            p.mul_("lora_A" in name)
    ours, loss = kl_of(model, readout, inputs, 100.0)
    torch.testing.assert_close(loss, answer_loss({"logits": ours}, inputs["labels"]), rtol=0, atol=1e-6)


def test_the_kl_term_leaves_the_model_as_it_was(batch):
    model, readout, inputs = batch("llama-likelihood")
    model.train()
    before = state_of(model)
    kl_of(model, readout, inputs, 1.0)
    assert same_state(model, before)


def test_the_kl_term_is_for_training_only(batch):
    model, readout, inputs = batch("llama-letters")
    with torch.no_grad():
        ours, loss = kl_of(model, readout, inputs, 50.0)
    assert torch.equal(loss, answer_loss({"logits": ours}, inputs["labels"]))


def test_the_kl_term_of_a_new_head_is_refused(tokenizer, tmp_path):
    with pytest.raises(InputError, match="classifier"):
        fit(KINDS["bert"].build(), KINDS["bert"].task(), Map(kl=0.1), arguments(tmp_path), tokenizer=tokenizer)


def trained_with(tokenizer, folder, optimizer=None, callbacks=()):
    """Six steps of AdamW over a language model's own loss, with a schedule and clipping."""
    model = make_model("llama")
    split = make_task(readout="likelihood").train
    readout = readout_for(model, split, tokenizer)
    args = arguments(folder, max_steps=6, learning_rate=0.02, optim="adamw_torch", adam_beta2=0.9, max_grad_norm=0.1)
    args.remove_unused_columns = False
    optimizers = (optimizer(model), None) if optimizer is not None else (None, None)
    with readout.attached(model):
        rows = readout.encode(split)[0]
        Trainer(
            model, args, readout.collate, rows, optimizers=optimizers, callbacks=list(callbacks),
            compute_loss_func=answer_loss,
        ).train()  # fmt: skip
    return read(model)


def test_decoupled_decay_is_adamws_own_bit_for_bit(tokenizer, tmp_path):
    def grouped(model):
        own = lora_parameters(model)
        return torch.optim.AdamW(
            [
                {"params": [p for n, p in own.items() if "lora_B" in n], "weight_decay": 20.5},
                {"params": [p for n, p in own.items() if "lora_B" not in n], "weight_decay": 0.5},
            ],
            lr=0.02, betas=(0.9, 0.9), eps=1e-8,
        )  # fmt: skip

    theirs = trained_with(tokenizer, tmp_path / "1", grouped)
    ours = trained_with(tokenizer, tmp_path / "2", callbacks=[DecoupledDecay(0.5, 20.0)])
    none = trained_with(tokenizer, tmp_path / "3")
    assert same_params(ours, theirs)
    assert not any(torch.equal(ours[name], none[name]) for name in ours)


def test_strong_decay_of_b_leads_back_to_the_base_model(tokenizer, tmp_path):
    model, task = make_model("llama"), make_task()
    args = arguments(tmp_path, lr_scheduler_type="constant", learning_rate=1e-3)
    before, after = read(model), fit(model, task, Map(weight_decay_b=900.0), args, tokenizer=tokenizer).mean
    for name in before:
        if "lora_B" in name:  # eight steps leave a 1e-8th of B, and each adds at most a learning rate
            assert after[name].abs().max() < 2e-3
        else:
            assert (after[name] - before[name]).abs().max() < 8.1e-3


class Untouched(TrainerCallback):
    def on_step_begin(self, *_, **__):
        raise AssertionError("training began")


@pytest.mark.parametrize("method", [Map(weight_decay_b=100.0), Map(weight_decay=60.0, weight_decay_b=40.0)], ids=str)
def test_decay_that_would_turn_signs_is_refused_before_training(method, tokenizer, tmp_path):
    with pytest.raises(InputError, match="not below 1"):
        fit(
            make_model(), make_task(), method, arguments(tmp_path, learning_rate=0.01), tokenizer=tokenizer,
            callbacks=[Untouched()],
        )  # fmt: skip


@pytest.mark.parametrize(
    "settings", [{"weight_decay": -1.0}, {"weight_decay_b": -1.0}, {"kl": -0.1}, {"early_stopping": 0}], ids=str
)
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        Map(**settings)


def test_early_stopping_without_evaluation_is_refused(tokenizer, tmp_path):
    callbacks = Map(early_stopping=2).trainer_kwargs(make_model(), 24)["callbacks"]
    with pytest.raises(InputError, match="load_best_model_at_end"):
        trained_with(tokenizer, tmp_path, callbacks=callbacks)


def test_early_stopping_without_a_validation_split_is_refused(tokenizer, tmp_path):
    task = replace(make_task(), validation=None)
    with pytest.raises(InputError, match="validation split"):
        fit(make_model(), task, Map(early_stopping=2), arguments(tmp_path), tokenizer=tokenizer)


def test_early_stopping_ends_with_the_best_adapter(tokenizer, tmp_path):
    task, seen = make_task(readout="likelihood"), {}

    class Diary(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen[metrics["eval_loss"]] = read(kwargs["model"])

    args = arguments(
        tmp_path, max_steps=40, learning_rate=0.3, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    posterior = fit(make_model(), task, Map(early_stopping=1), args, tokenizer=tokenizer, callbacks=[Diary()])
    assert 2 <= len(seen) < 20
    assert same_params(posterior.mean, seen[min(seen)])


def test_two_certain_and_opposite_members_have_mutual_information_ln_2(tokenizer):
    kind = KINDS["bert"]
    model, split = kind.build(), kind.task().test
    base = read(model)
    head = {n: torch.zeros_like(p) for n, p in base.items() if "classifier" in n}
    bias = next(n for n in head if n.endswith("bias"))
    certain = [base | head | {bias: torch.tensor(row)} for row in ([80.0, 0.0, 0.0], [0.0, 80.0, 0.0])]
    mixture = Mixture(tuple(Point(p) for p in certain))
    prediction = predict(model, mixture, split, draws=10, tokenizer=tokenizer)
    assert prediction.draws == 2
    ln2 = torch.full((len(split),), math.log(2.0))
    torch.testing.assert_close(prediction.mutual_information, ln2, rtol=1e-6, atol=0)
    torch.testing.assert_close(prediction.between, ln2, rtol=1e-6, atol=0)
    torch.testing.assert_close(prediction.entropy, ln2, rtol=1e-6, atol=0)
    assert (prediction.expected_entropy.abs() < 1e-6).all()
    torch.testing.assert_close(prediction.probs[:, :2], torch.full((len(split), 2), 0.5), rtol=1e-6, atol=0)


def test_equal_members_have_no_mutual_information(tokenizer):
    model, split = make_model(), make_task().test
    mixture = Mixture((Point(read(model)), Point(read(model))))
    assert torch.equal(predict(model, mixture, split, tokenizer=tokenizer).mutual_information, torch.zeros(len(split)))


def test_probabilities_of_members_are_averaged_and_not_logits(tokenizer):
    model, split = make_model(), make_task(readout="likelihood").test
    members = (Point(read(model)), Point({n: -3 * p for n, p in read(model).items()}))
    alone = [predict(model, m, split, tokenizer=tokenizer).probs for m in members]
    mixed = predict(model, Mixture(members), split, tokenizer=tokenizer).probs
    torch.testing.assert_close(mixed, (alone[0] + alone[1]) / 2, rtol=1e-5, atol=1e-7)
