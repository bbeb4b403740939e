"""Every method in trainers that are not ours: the stock Trainer of transformers and TRL's SFTTrainer."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from support.methods_table import DROPOUT, LEARNERS, TABLE
from support.tiny import CHECKPOINTING, COLOURS, TARGETS, arguments, make_base, make_model, make_tokenizer, same_params
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from bayeslora.errors import InputError
from bayeslora.methods import Blob, Ensemble, Map, Swag
from bayeslora.methods.regularisers import answer_loss
from bayeslora.params import lora_parameters, read
from bayeslora.posteriors import LowRankGaussian
from bayeslora.posteriors.loading import load_posterior

ROWS = 16


def sentences():
    """Prompts and completions."""
    return [(f"Question: bag holds {n} red, {n % 7} blue.\nAnswer:", " " + COLOURS[n % 4]) for n in range(ROWS)]


def language_model_batch(tokenizer, rows):
    """What a user's own collator gives: ids, mask, and labels on the completion and the end of the text alone."""
    batch = dict(
        tokenizer(
            [a + b + tokenizer.eos_token for a, b in rows], padding=True, padding_side="right", return_tensors="pt"
        )
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, (prompt, _) in enumerate(rows):
        labels[row, : len(tokenizer(prompt)["input_ids"])] = -100
    return {**batch, "labels": labels}


def stock(model, args, tokenizer, kwargs):
    args.remove_unused_columns = False
    return Trainer(model, args, lambda rows: language_model_batch(tokenizer, rows), sentences(), **kwargs)


def sft_arguments(folder, **changes):
    plain = arguments(folder)
    same = ("max_steps", "per_device_train_batch_size", "learning_rate", "save_strategy", "report_to", "disable_tqdm",
            "logging_strategy", "use_cpu", "seed")  # fmt: skip
    return SFTConfig(str(folder), **({name: getattr(plain, name) for name in same} | {CHECKPOINTING: True} | changes))


def sft(model, args, tokenizer, kwargs, **more):
    rows = Dataset.from_list([{"prompt": a, "completion": b} for a, b in sentences()])
    return SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, **more, **kwargs)


TRAINERS = {"transformers": (arguments, stock), "trl": (sft_arguments, sft)}


def chat_tokenizer():
    found = make_tokenizer()
    found.chat_template = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    return found


def chats(model, args, tokenizer, kwargs):
    """An SFTTrainer on messages, which go through the chat template."""
    turns = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in sentences()
    ]
    return SFTTrainer(model, args, train_dataset=Dataset.from_list(turns), processing_class=chat_tokenizer(), **kwargs)


def packed_arguments(folder, **changes):
    return sft_arguments(folder, packing=True, max_length=64, **changes)


SHAPES = {"chats": (sft_arguments, chats), "packed": (packed_arguments, sft)}
"""Other shapes of an SFTTrainer's rows; those that are packed follow each other in one row of a batch."""


def trained(method, args, make, tokenizer):
    """The loop that the documentation shows."""
    model = make_model("llama", lora_dropout=DROPOUT)
    if isinstance(method, Ensemble):
        for member in range(method.members):
            own = method.member_arguments(args, member)
            trainer = make(model, own, tokenizer, method.trainer_kwargs(model, num_data=ROWS))
            trainer.train()
    else:
        trainer = make(model, args, tokenizer, method.trainer_kwargs(model, num_data=ROWS))
        trainer.train()
    return trainer.model, method.posterior(trainer.model)


@pytest.mark.parametrize(
    ("name", "trainer"),
    [row.param("transformers") for row in LEARNERS if row.retrained]
    + [row.param(trainer) for trainer in ("trl", "chats") for row in LEARNERS]
    + [row.param("packed") for row in LEARNERS if row.packed],
)
def test_a_method_learns_in_any_trainer(name, trainer, tokenizer, tmp_path):
    method = TABLE[name].method
    make_arguments, make = (TRAINERS | SHAPES)[trainer]
    before = read(make_model("llama", lora_dropout=DROPOUT))
    model, posterior = trained(method, make_arguments(tmp_path / "run"), make, tokenizer)
    assert posterior.origin is not None
    assert posterior.origin.method == method.name
    assert posterior.origin.num_data == ROWS
    assert {n: p.shape for n, p in posterior.mean.items()} == {n: p.shape for n, p in lora_parameters(model).items()}
    assert not any(torch.equal(posterior.mean[n], before[n]) for n in before)
    if posterior.distinct != 1:
        assert not same_params(posterior.draw(0), posterior.draw(1))
    posterior.save_pretrained(tmp_path / "posterior")
    assert same_params(load_posterior(tmp_path / "posterior").draw(1), posterior.draw(1))


def test_both_trainers_learn_the_same_from_the_same_rows(tokenizer, tmp_path):
    method = Swag(start=2, interval=1)
    found = []
    for name, (make_arguments, make) in TRAINERS.items():
        exact = {CHECKPOINTING: False, "bf16": False, "optim": "sgd", "weight_decay": 0.0}
        args = make_arguments(tmp_path / name, **exact)
        model = make_model("llama")
        make(model, args, tokenizer, method.trainer_kwargs(model, ROWS)).train()
        found.append(method.posterior(model).mean)
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


def test_packed_rows_have_the_loss_of_rows_apart(tokenizer, tmp_path):
    model = make_model("llama")
    trainer = sft(model, packed_arguments(tmp_path, bf16=False, **{CHECKPOINTING: False}), tokenizer, {})
    batch = next(iter(trainer.get_train_dataloader()))
    starts = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), batch["input_ids"].shape[1]]
    labels = batch.pop("labels")
    assert len(starts) - 1 > len(batch["input_ids"]) == 1  # several rows of the data in the only row of the batch
    with torch.no_grad():
        together = answer_loss(model.eval()(**batch, use_cache=False), labels, 1)
        apart = sum(
            answer_loss(model(input_ids=batch["input_ids"][:, a:b], use_cache=False), labels[:, a:b], 1)
            for a, b in pairwise(starts)
        )
    torch.testing.assert_close(together, apart)


def counted(trainer, blob):
    """The tokens by which BLoB divides its divergence at the end of a run."""
    trainer.train()
    return float(blob["callbacks"][2].tokens.per_row)


def labels_of(trainer):
    """The tokens that are trained in an epoch: a causal model does not predict the first."""
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in trainer.get_train_dataloader())


@pytest.mark.parametrize("shape", ["transformers", "trl", "chats", "packed"])
def test_the_divergence_is_divided_by_the_tokens_of_a_row_where_the_loss_is_their_mean(shape, tokenizer, tmp_path):
    make_arguments, make = (TRAINERS | SHAPES)[shape]
    for rows in (ROWS, 10 * ROWS):  # N is the user's: the number of rows, or of tokens, where a row is then a token
        model, args = make_model("llama"), make_arguments(tmp_path / f"run-{rows}", max_steps=-1, num_train_epochs=2)
        kwargs = Blob().trainer_kwargs(model, rows)
        trainer = make(model, args, tokenizer, kwargs)
        expected = labels_of(trainer) / rows
        assert expected > 0
        assert counted(trainer, kwargs) == pytest.approx(expected, rel=1e-6)
        assert not model._forward_pre_hooks


def test_a_loss_of_whole_rows_leaves_the_divergence_as_it_is(tokenizer, tmp_path):
    model = make_model("llama")
    kwargs = Blob().trainer_kwargs(model, ROWS) | {"compute_loss_func": answer_loss}
    assert counted(stock(model, arguments(tmp_path / "own"), tokenizer, kwargs), kwargs) == 1.0
    kwargs = Blob(tokens_per_row=3.0).trainer_kwargs(model, ROWS)
    assert counted(stock(model, arguments(tmp_path / "given"), tokenizer, kwargs), kwargs) == 3.0


class OwnLoss(SFTTrainer):
    """A Trainer that takes ``compute_loss_func`` and does not ask it."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        outputs = model(**inputs, use_cache=False)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_a_kl_term_that_the_trainer_leaves_out_is_refused(tokenizer, tmp_path):
    model, method = make_model("llama"), Map(kl=0.1)
    rows = Dataset.from_list([{"prompt": a, "completion": b} for a, b in sentences()])
    trainer = OwnLoss(
        model, sft_arguments(tmp_path), train_dataset=rows, processing_class=tokenizer,
        **method.trainer_kwargs(model, ROWS),
    )  # fmt: skip
    with pytest.raises(InputError, match="does not call compute_loss_func"):
        trainer.train()


def test_swag_serves_the_adapter_that_sft_trainer_makes_itself(tokenizer, tmp_path):
    method, base = Swag(), make_base("llama")
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=TARGETS["llama"])
    trainer = sft(base, sft_arguments(tmp_path), tokenizer, method.trainer_kwargs(base, ROWS), peft_config=config)
    trainer.train()
    posterior = method.posterior(trainer.model)
    assert isinstance(posterior, LowRankGaussian)
    assert posterior.mean.keys() == lora_parameters(trainer.model).keys()


def test_members_with_the_same_seed_are_refused(tokenizer, tmp_path):
    model, method, args = make_model("llama"), Ensemble(2), arguments(tmp_path, max_steps=1)
    stock(model, args, tokenizer, method.trainer_kwargs(model, ROWS)).train()
    with pytest.raises(InputError, match="member_arguments"):
        stock(model, args, tokenizer, method.trainer_kwargs(model, ROWS)).train()


def test_an_ensemble_with_members_missing_is_refused(tokenizer, tmp_path):
    model, method = make_model("llama"), Ensemble(2)
    args = method.member_arguments(arguments(tmp_path, max_steps=1), 0)
    stock(model, args, tokenizer, method.trainer_kwargs(model, ROWS)).train()
    with pytest.raises(InputError, match="1 of the ensemble's 2 members"):
        method.posterior(model)


class StopAfter(TrainerCallback):
    """Ends a run after three steps, as a time limit would."""

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= 3


@pytest.mark.parametrize(("name", "stopped"), [("ensemble", 0), ("ensemble", 1), ("multiswag", 1)])
def test_a_member_that_was_stopped_is_resumed_and_the_ensemble_is_the_uninterrupted_one(
    name, stopped, tokenizer, tmp_path
):
    method = TABLE[name].method
    early = pytest.raises(InputError, match="collected 0 snapshots") if name == "multiswag" else nullcontext()
    _, whole = trained(method, arguments(tmp_path / "whole"), stock, tokenizer)
    model, args = (
        make_model("llama", lora_dropout=DROPOUT),
        arguments(tmp_path / "parts", save_strategy="steps", save_steps=3),
    )
    for member in range(method.members):
        own = method.member_arguments(args, member)
        if member == stopped:
            trainer = stock(model, own, tokenizer, method.trainer_kwargs(model, ROWS))
            trainer.add_callback(StopAfter())
            with early:
                trainer.train()
        trainer = stock(model, own, tokenizer, method.trainer_kwargs(model, ROWS))
        trainer.train(resume_from_checkpoint=member == stopped)
    posterior = method.posterior(model)
    assert all(same_params(posterior.draw(k), whole.draw(k)) for k in range(4))


@pytest.mark.parametrize("name", ["swag", "ensemble"])
def test_a_posterior_without_training_is_refused(name):
    with pytest.raises(InputError, match="was not trained with"):
        TABLE[name].method.posterior(make_model("llama"))


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("num_data", [0, -1, 2.5])
def test_a_number_of_examples_that_is_none_is_refused(name, num_data):
    with pytest.raises(InputError, match="num_data"):
        TABLE[name].method.trainer_kwargs(make_model("llama"), num_data)
