"""A task of the LM evaluation harness on a posterior: a tiny model, rows of one's own, nothing from the network.

    python examples/prediction/lm_eval_task.py

Half a minute, most of it imports; needs pip install 'bayeslora[lm-eval]'.
"""

import json
import tempfile
from pathlib import Path

from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

import bayeslora as bl
from bayeslora.integrations.lm_eval import PosteriorLM, evaluate_tasks, find_tasks

TASK = """task: larger
dataset_path: json
dataset_kwargs: {data_files: {test: TEST}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}} :"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""

words = {word: k for k, word in enumerate(["<pad>", "<unk>", "</s>", "larger", "or", ":", *map(str, range(10))])}
core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), pad_token_id=0, max_position_embeddings=64, **size))
model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    pairs = [(a, b) for a in range(10) for b in range(10) if a != b]
    rows = [{"question": f"larger {a} or {b}", "choices": [str(a), str(b)], "label": int(b > a)} for a, b in pairs]
    for split, own in {"train": rows[::2], "test": rows[1::2]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    (folder / "larger.yaml").write_text(TASK.replace("TEST", str(folder / "test.jsonl")))

    task = bl.load_task("larger", data=folder, readout="likelihood", template="{text} :")
    args = TrainingArguments(
        str(folder / "run"), max_steps=60, learning_rate=2e-2, save_strategy="no", report_to="none", disable_tqdm=True
    )
    posterior = bl.fit(model, task, bl.Swag(start=30, interval=3), args, tokenizer=tokenizer)

    tasks, manager = find_tasks(["larger"], str(folder))
    for what, of in {"mean": bl.Point(posterior.mean), "10 draws": posterior}.items():
        lm = PosteriorLM(model, of, draws=10, tokenizer=tokenizer)
        found = evaluate_tasks(lm, tasks, manager=manager)["results"]["larger"]
        print(what, {key: round(found[f"{key},none"], 3) for key in ("acc", "nll", "ece", "brier")})
