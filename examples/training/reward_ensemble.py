"""An ensemble of reward models in TRL's RewardTrainer: rewards with uncertainty, and the best answer in spite of it.

    python examples/training/reward_ensemble.py

A tiny model, some seconds; --model NAME for a real one; pip install trl.
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import RewardConfig, RewardTrainer

import bayeslora as bl
from bayeslora.prediction.rewards import penalised_rewards, predict_rewards, preference_probability


def tiny():
    """A model of two layers that reads letters, not trained, with one output."""
    set_seed(0)
    letters = {c: k for k, c in enumerate(["<pad>", "</s>", *map(chr, range(32, 127))])}
    core = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**size, vocab_size=len(letters), pad_token_id=0, eos_token_id=1, num_labels=1)
    return LlamaForSequenceClassification(config), tokenizer


parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a language model of the Hub, or a folder; none for a tiny one")
name = parser.parse_args().model
base, tokenizer = tiny()
if name:
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base.config.pad_token_id = tokenizer.pad_token_id

rows = [
    {
        "prompt": f"Please count to {n}.",
        "chosen": f" Gladly: {', '.join(map(str, range(1, n + 1)))}.",
        "rejected": " No.",
    }
    for n in range(2, 22)
]

method = bl.Ensemble(3)
model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"))
args = RewardConfig(
    "reward/run", max_steps=30, learning_rate=1e-2, save_strategy="no", report_to="none", bf16=torch.cuda.is_available()
)
for member in range(method.members):
    trainer = RewardTrainer(
        model,
        args=method.member_arguments(args, member),
        train_dataset=Dataset.from_list(rows[:16]),
        processing_class=tokenizer,
        **method.trainer_kwargs(model, num_data=16),
    )
    trainer.train()
posterior = method.posterior(model)
posterior.save_pretrained("reward/posterior", overwrite=True)

chosen, rejected = (
    predict_rewards(model, posterior, [row["prompt"] + row[side] for row in rows[16:]], tokenizer=tokenizer)
    for side in ("chosen", "rejected")
)  # [members, texts]
for row, p, gap in zip(rows[16:], preference_probability(chosen, rejected), (chosen - rejected).T, strict=True):
    print(f"{row['prompt']}{row['chosen']} P = {p:.2f}, r − r' = {gap.mean():.2f} ± {gap.std():.2f}")

answers = ["Please count to 3." + answer for answer in (" No.", " Gladly: 1, 2, 3.", " Gladly.", " Maybe.")]
rewards = predict_rewards(model, posterior, answers, tokenizer=tokenizer)
best = penalised_rewards(rewards, 1.0, reference=rejected).argmax()
print("the best of", len(answers), "by mean − deviation:", answers[best])
