"""SWAG in TRL's DPOTrainer: preferences, and how sure the draws are of them.

    python examples/training/dpo_trainer.py

A tiny model, some seconds; --model NAME for a real one; pip install trl.
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import DPOConfig, DPOTrainer

import bayeslora as bl
from bayeslora.tasks.types import Example, Format, Split
from bayeslora.training.trainer_kwargs import kwargs_for


def tiny():
    """A model of two layers that reads letters, not trained."""
    set_seed(0)
    letters = {c: k for k, c in enumerate(["<pad>", "</s>", *map(chr, range(32, 127))])}
    core = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**size, vocab_size=len(letters), pad_token_id=0, eos_token_id=1)), tokenizer


parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a causal language model of the Hub, or a folder; none for a tiny one")
name = parser.parse_args().model
base, tokenizer = tiny()
if name:
    base, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)

rows = [{"prompt": f"Please count to {n}.", "chosen": " Gladly.", "rejected": " Not now."} for n in range(2, 22)]

method = bl.Swag(start=10, interval=2)
model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
args = DPOConfig(
    "dpo/run", max_steps=30, learning_rate=1e-3, save_strategy="no", report_to="none", bf16=torch.cuda.is_available()
)
trainer = DPOTrainer(
    model,
    args=args,
    train_dataset=Dataset.from_list(rows[:16]),
    processing_class=tokenizer,
    **kwargs_for(DPOTrainer, method, model, num_data=16),
)
trainer.train()
posterior = method.posterior(trainer.model)
posterior.save_pretrained("dpo/posterior", overwrite=True)

pairs = tuple(Example(row["prompt"], (row["chosen"].strip(), row["rejected"].strip()), 0) for row in rows[16:])
held_out = Split("pairs", pairs, Format(template="{text}", readout="likelihood"))
prediction = bl.predict(model, posterior, held_out, draws=10, tokenizer=tokenizer)
for pair, p, error in zip(pairs, prediction.probs[:, 0], prediction.log_probs.exp().std(0)[:, 0], strict=False):
    print(f"{pair.text!r}: {pair.choices[0]} with {p:.3f} ± {error:.3f}")
