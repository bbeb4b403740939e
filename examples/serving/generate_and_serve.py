"""Text from a posterior, and the same through the server and OpenAI's client: a tiny model, nothing from the network.

    python examples/serving/generate_and_serve.py

Half a minute, most of it imports; pip install 'bayeslora[serve]' openai.
"""

import threading
import time

import openai
import torch
import uvicorn
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import bayeslora as bl
from bayeslora.integrations.server import Served, make_app
from bayeslora.params import read
from bayeslora.tasks.types import Format, Split

letters = {c: k for k, c in enumerate(["<pad>", "</s>", *map(chr, range(32, 127))])}
core = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
core.decoder = decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(**size, vocab_size=len(letters), pad_token_id=0, eos_token_id=None))
model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))

mean = read(model)  # in real work: bl.fit, or bl.load_posterior("org/posterior")
posterior = bl.DiagonalGaussian(mean, {name: torch.full_like(value, 0.05) for name, value in mean.items()})

answer = bl.generate(model, posterior, ["2 + 2 ="], draws=5, tokenizer=tokenizer, max_new_tokens=8)[0]
print("average of five draws:", repr(answer.text), "mutual information", answer.mutual_information.tolist())
each = bl.generate_each(model, posterior, ["2 + 2 ="], draws=5, tokenizer=tokenizer, max_new_tokens=8)[0]
print("one answer a draw:", [a.text for a in each.answers], "semantic entropy", round(each.semantic_entropy, 3))

served = Served("tiny", model, tokenizer, posterior, draws=5, most_draws=8, like=Split("input", (), Format("")))
server = uvicorn.Server(uvicorn.Config(make_app(served), port=0, log_level="error"))
thread = threading.Thread(target=server.run, daemon=True)
thread.start()
while not server.started:
    time.sleep(0.05)
port = server.servers[0].sockets[0].getsockname()[1]

client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="anything")
found = client.completions.create(model="tiny", prompt="2 + 2 =", max_tokens=8, temperature=0)
print("through the server:", repr(found.choices[0].text), found.choices[0].uncertainty["mean_mutual_information"])
assert found.choices[0].text == answer.text
server.should_exit = True
thread.join()
