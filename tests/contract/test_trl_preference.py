"""Every method on preferences: TRL's DPOTrainer and RewardTrainer, and rewards under draws."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from support.methods_table import DROPOUT, LEARNERS, TABLE
from support.preferences import PAIRS, ROWS, TEXTS, reward_model
from support.tiny import (
    CHECKPOINTING,
    TARGETS,
    arguments,
    make_base,
    make_model,
    make_tokenizer,
    same_params,
    same_state,
    state_of,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from bayeslora.errors import InputError
from bayeslora.methods import Blob, Ensemble, Ivon, Map, Swag
from bayeslora.params import lora_parameters, read, swapped
from bayeslora.posteriors import Point
from bayeslora.prediction.rewards import predict_rewards, preference_probability
from bayeslora.training.trainer_kwargs import kwargs_for


def configured(kind, folder, **changes):
    plain = arguments(folder)
    same = ("max_steps", "per_device_train_batch_size", "learning_rate", "save_strategy", "report_to", "disable_tqdm",
            "logging_strategy", "use_cpu", "seed")  # fmt: skip
    exact = {"bf16": False, CHECKPOINTING: False}
    return kind(str(folder), **({name: getattr(plain, name) for name in same} | exact | changes))


def dpo(model, args, tokenizer, kwargs):
    """A DPOTrainer whose reference is the base model, the adapter off, also for an ensemble's next members."""
    trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer, **kwargs)
    trainer.model.delete_adapter("ref")
    return trainer


def reward(model, args, tokenizer, kwargs):
    return RewardTrainer(
        model, args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer, **kwargs
    )  # fmt: skip


TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig, dpo, lambda **lora: make_model("llama", **lora)),
    "reward": (RewardTrainer, RewardConfig, reward, reward_model),
}


def trained(method, trainer, folder, tokenizer, **changes):
    """The loop that the documentation shows."""
    kind, config, make, build = TRAINERS[trainer]
    model, args = build(lora_dropout=DROPOUT), configured(config, folder, **changes)
    runs = [method.member_arguments(args, k) for k in range(method.members)] if isinstance(method, Ensemble) else [args]
    for own in runs:
        make(model, own, tokenizer, kwargs_for(kind, method, model, ROWS)).train()
    return model, method.posterior(model)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("name", [row.param() for row in LEARNERS if not row.own_loss])
def test_a_method_learns_from_preferences(name, trainer, tokenizer, tmp_path):
    start = read(TRAINERS[trainer][3]())
    model, posterior = trained(TABLE[name].method, trainer, tmp_path, tokenizer)
    assert posterior.origin is not None
    assert (posterior.origin.method, posterior.origin.num_data) == (TABLE[name].method.name, ROWS)
    assert {n: p.shape for n, p in posterior.mean.items()} == {n: p.shape for n, p in lora_parameters(model).items()}
    assert all(bool(p.isfinite().all()) for p in posterior.mean.values())
    assert not any(torch.equal(posterior.mean[n], start[n]) for n in start)
    if posterior.distinct != 1:
        assert not same_params(posterior.draw(0), posterior.draw(1))
    assert all(type(m).__module__.startswith(("torch.nn", "peft", "transformers")) for m in model.modules())
    before = state_of(model)
    with posterior.applied(model, 1 if posterior.distinct != 1 else 0):
        pass
    assert same_state(model, before)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_kl_term_is_refused_where_the_trainer_has_its_own_loss(trainer):
    kind, _, _, build = TRAINERS[trainer]
    with pytest.raises(InputError, match=f"{kind.__name__} computes a loss of its own"):
        kwargs_for(kind, Map(kl=0.1), build(), ROWS)


def test_a_map_run_is_the_plain_dpo_run_bit_for_bit(tokenizer, tmp_path):
    found = []
    for make in (lambda model: {}, lambda model: Map().trainer_kwargs(model, ROWS)):
        model = make_model("llama", lora_dropout=DROPOUT)
        dpo(model, configured(DPOConfig, tmp_path), tokenizer, make(model)).train()
        found.append(read(model))
    assert same_params(*found)


@pytest.mark.parametrize("name", ["ivon", "blob"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_gradient_checkpointing_sees_the_same_noise(name, trainer, tokenizer, tmp_path):
    plain, again = (
        trained(TABLE[name].method, trainer, tmp_path, tokenizer, **{CHECKPOINTING: value})[1]
        for value in (False, True)
    )
    assert same_params(plain.draw(0), again.draw(0))


def summed(logits, batch):
    """Log-probability of each row's completion; of all its tokens where TRL is too old to name the completion's."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = batch.get("labels", ids.masked_fill(mask == 0, -100))[:, 1:]
    own = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return (own * (labels != -100)).sum(1)


def said(outputs, batch):
    """What a pass of the Trainer said of each row."""
    return (
        outputs.log_probs.sum(1).detach() if hasattr(outputs, "log_probs") else summed(outputs.logits.detach(), batch)
    )


def log_probs(model, batch):
    """The same by a pass in evaluation mode."""
    with torch.no_grad():
        return summed(model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch)


@pytest.mark.parametrize("reference", ["base", "copy"])
@pytest.mark.parametrize("name", ["ivon", "blob"])
def test_the_reference_of_dpo_has_no_noise_and_the_trained_pass_has(name, reference, tokenizer, tmp_path):
    model, seen = make_model("llama"), []
    kwargs = kwargs_for(DPOTrainer, TABLE[name].method, model, ROWS)
    rows = Dataset.from_list(PAIRS)
    trainer = DPOTrainer(
        model, args=configured(DPOConfig, tmp_path), train_dataset=rows, processing_class=tokenizer, **kwargs
    )
    if reference == "base":
        model.delete_adapter("ref")

    def look(_, args, inputs, outputs):
        seen.append((torch.is_grad_enabled(), inputs, said(outputs, inputs)))

    model.register_forward_hook(look, with_kwargs=True)
    trainer.train()
    wanted = make_base("llama") if reference == "base" else make_model("llama")
    passes = [(inputs, found) for trains, inputs, found in seen if not trains]
    assert len(passes) == trainer.state.max_steps
    for inputs, found in passes:
        torch.testing.assert_close(found, log_probs(wanted, inputs), rtol=1e-4, atol=1e-4)
    trains, inputs, first = seen[0]
    assert trains
    assert not torch.allclose(first, log_probs(make_model("llama"), inputs), rtol=1e-4, atol=1e-4)


def test_chosen_and_rejected_are_under_the_same_draw_of_ivon(tokenizer, tmp_path):
    model, method, seen = make_model("llama"), Ivon(), []
    trainer = dpo(
        model, configured(DPOConfig, tmp_path, max_steps=3), tokenizer, kwargs_for(DPOTrainer, method, model, 16)
    )

    def look(_, args, inputs, outputs):
        if torch.is_grad_enabled():
            own = trainer.optimizer.optimizer
            draw = {name: (own.mean(p) + own.noise(p)).clone() for name, p in lora_parameters(model).items()}
            seen.append((draw, inputs, said(outputs, inputs)))

    model.register_forward_hook(look, with_kwargs=True)
    trainer.train()
    plain = make_model("llama")
    for draw, inputs, found in seen:
        with swapped(plain, draw):
            torch.testing.assert_close(found, log_probs(plain, inputs), rtol=1e-4, atol=1e-4)
    assert not any(torch.equal(seen[0][0][name], seen[1][0][name]) for name in seen[0][0])


def test_dpo_trains_the_adapter_that_it_makes_itself(tokenizer, tmp_path):
    method, base = Swag(), make_base("llama")
    trainer = DPOTrainer(
        base, args=configured(DPOConfig, tmp_path), train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=TARGETS["llama"]),
        **kwargs_for(DPOTrainer, method, base, ROWS),
    )  # fmt: skip
    trainer.train()
    assert method.posterior(trainer.model).mean.keys() == lora_parameters(trainer.model).keys()


def test_an_optimiser_is_given_where_its_class_is_not_taken(tokenizer, tmp_path):
    found = []
    for kind in (SFTTrainer, DPOTrainer):
        model, method = make_model("llama"), Ivon()
        kwargs = kwargs_for(kind, method, model, ROWS)
        assert ("optimizers" in kwargs) == (kind is DPOTrainer)
        rows = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS])
        args = configured(SFTConfig, tmp_path)
        SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, **kwargs).train()
        found.append(method.posterior(model))
    assert same_params(found[0].draw(3), found[1].draw(3))
    with pytest.raises(InputError, match="without an adapter"):
        kwargs_for(DPOTrainer, Ivon(), make_base("llama"), ROWS)


def test_texts_and_chats_are_encoded_as_the_reward_trainer_does(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    model = reward_model()
    for texts in (TEXTS, [[{"role": "user", "content": text}] for text in TEXTS]):
        rows = Dataset.from_list([{"chosen": a, "rejected": b} for a, b in zip(texts[::2], texts[1::2], strict=True)])
        args = configured(RewardConfig, tmp_path)
        trainer = RewardTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
        ids = [row[f"{side}_ids"] for row in trainer.train_dataset for side in ("chosen", "rejected")]
        with torch.no_grad():
            wanted = torch.tensor([model.eval()(input_ids=torch.tensor([row])).logits.item() for row in ids])
        found = predict_rewards(model, Point(read(model)), texts, tokenizer=tokenizer)
        torch.testing.assert_close(found[0], wanted)


def test_draws_of_a_trained_reward_model_disagree_about_rewards(tokenizer, tmp_path):
    model, posterior = trained(Ensemble(2, Blob()), "reward", tmp_path, tokenizer)
    found = predict_rewards(model, posterior, TEXTS, 4, tokenizer=tokenizer)
    assert found.shape == (4, len(TEXTS))
    assert float(found.std(0).min()) > 0
    chosen, rejected = found[:, ::2], found[:, 1::2]
    both = preference_probability(chosen, rejected) + preference_probability(rejected, chosen)
    torch.testing.assert_close(both, torch.ones(5))
