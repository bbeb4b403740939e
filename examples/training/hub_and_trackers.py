"""Train with a tracker, and write a posterior with a card of its figures; with --repo, put it on the Hub.

    python examples/training/hub_and_trackers.py

A tiny model, half a minute; pip install trackio; --repo org/name to push.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TRACKIO_DIR", "tracked")  # where trackio keeps its runs; unset for its own place

from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

import bayeslora as bl
from bayeslora.tasks.synthetic import chance_task

parser = argparse.ArgumentParser()
parser.add_argument("--repo", help="repository to push to, such as org/name")
parser.add_argument("--report-to", default="trackio", help="trackio, wandb, mlflow, tensorboard or none")
options = parser.parse_args()

letters = {c: k for k, c in enumerate(["<pad>", "</s>", "\n", *map(chr, range(32, 127))])}
core = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(**size, vocab_size=len(letters), pad_token_id=0, eos_token_id=1))
model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))

task = chance_task(train_rows=60, test_rows=40)
args = TrainingArguments(
    "hub/run", max_steps=20, learning_rate=1e-2, logging_steps=5, eval_strategy="steps", eval_steps=10,
    save_strategy="no", report_to=options.report_to, project="bayeslora", disable_tqdm=True,
)  # fmt: skip
posterior = bl.fit(model, task, bl.Ivon(), args, tokenizer=tokenizer)  # IVON's figures and the scores are logged
scores = bl.evaluate(bl.predict(model, posterior, task.test, 5, tokenizer=tokenizer), task.test, resamples=200)

where = {"push_to_hub": True, "repo_id": options.repo} if options.repo else {}
posterior.save_pretrained("hub/posterior", overwrite=True, evaluation=scores, task=task.name, **where)
print(Path("hub/posterior/README.md").read_text(encoding="utf-8"))
