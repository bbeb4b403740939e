"""Language models of random weights, a tokenizer for them, and a generated task: nothing is fetched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import bayeslora as bl
from bayeslora.params import read
from bayeslora.posteriors import DiagonalGaussian, Posterior
from bayeslora.posteriors.provenance import origin_of
from bayeslora.tasks.synthetic import chance_task
from bayeslora.tasks.types import Task

TINY = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
LLAMA_2_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32,
}  # fmt: skip
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Stand:
    """A model with an adapter, its tokenizer, and rows to answer."""

    model: Any
    tokenizer: Any
    task: Task

    def posterior(self) -> DiagonalGaussian:
        """Return a posterior around the model's adapter, with noise in all of it."""
        mean = read(self.model)
        return DiagonalGaussian(
            mean, {n: torch.full_like(m, 1e-4) for n, m in mean.items()}, origin_of(self.model, "ivon")
        )

    def predict(self, posterior: Posterior, draws: int | bl.Draws, rows: int) -> bl.Prediction:
        """Return the predictions of some rows by draws alone."""
        some = self.task.test.take(range(rows))
        return bl.predict(self.model, posterior, some, draws, tokenizer=self.tokenizer, mean=False)


def tokenizer_for(task: Task) -> PreTrainedTokenizerFast:
    """Return a tokenizer of less than a thousand tokens that knows the texts of a task."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [text for example in task.train for text in (example.text, *example.choices)]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", model_max_length=2048)


def random_stand(
    shape: dict[str, int], device: torch.device, dtype: torch.dtype, *, bits: int = 16, rank: int = 16, rows: int = 400
) -> Stand:
    """Return a Llama of random weights with an adapter on all linear layers, in 4 bits if asked."""
    task = chance_task(200, 16, rows)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            base = LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=0, bos_token_id=None, eos_token_id=None))
    finally:
        torch.set_default_dtype(before)
    if bits == 4:
        _quantise(base, device, dtype)
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=ALL_LINEAR)
    return Stand(get_peft_model(base, config), tokenizer_for(task), task)


def _quantise(base: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Put layers of 4 bits in the place of the decoder's linear ones, as loading with bitsandbytes does."""
    import bitsandbytes as bnb

    for parent in list(base.model.modules()):
        for name, plain in list(parent.named_children()):
            if type(plain) is nn.Linear:
                layer = bnb.nn.Linear4bit(
                    plain.in_features, plain.out_features, bias=False, compute_dtype=dtype, quant_type="nf4",
                    device="meta",
                )  # fmt: skip
                weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4", module=layer)
                layer.weight = weight.to(device)
                setattr(parent, name, layer)
    base.is_loaded_in_4bit = True
