"""QLoRA with IVON: a 4-bit base, a posterior over its adapter, and text from the average of its draws.

    python examples/training/qlora_4bit.py

A tiny model, some seconds; --model NAME for a real one; needs pip install bitsandbytes, and no GPU.
"""

import argparse
import tempfile

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

import bayeslora as bl
from bayeslora.tasks.synthetic import chance_task


def tiny(folder):
    """Write a model of two layers that reads letters, not trained, into a folder."""
    set_seed(0)
    letters = {c: k for k, c in enumerate(["<pad>", "</s>", "\n", *map(chr, range(32, 127))])}
    core = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**size, vocab_size=len(letters), pad_token_id=0, eos_token_id=1)).save_pretrained(
        folder
    )
    return folder


parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a causal language model of the Hub, or a folder; none for a tiny one")
name = parser.parse_args().model or tiny(tempfile.mkdtemp())

bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
place = {"": 0} if torch.cuda.is_available() else "cpu"
base = AutoModelForCausalLM.from_pretrained(name, quantization_config=bits, device_map=place)
base = prepare_model_for_kbit_training(base)
model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
tokenizer = AutoTokenizer.from_pretrained(name)

task = chance_task(train_rows=24, test_rows=12)
args = TrainingArguments(
    "qlora/run",
    max_steps=12,
    learning_rate=5e-3,
    per_device_train_batch_size=4,
    gradient_checkpointing=True,
    save_strategy="no",
    report_to="none",
)
posterior = bl.fit(model, task, bl.Ivon(), args, tokenizer=tokenizer)
posterior.save_pretrained("qlora/posterior", overwrite=True)

prediction = bl.predict(model, posterior, task.test, draws=5, tokenizer=tokenizer)
print(bl.evaluate(prediction, task.test, resamples=0).table())
prompt = next(iter(task.test)).text
(answer,) = bl.generate(model, posterior, [prompt], draws=5, tokenizer=tokenizer, max_new_tokens=8)
print(repr(answer.text), answer.entropy, answer.mutual_information)
