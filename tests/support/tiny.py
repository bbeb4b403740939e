"""Tiny models and a tiny task, built from configurations without a download, and what tests compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainingArguments,
)

from bayeslora.params import read
from bayeslora.posteriors import DiagonalGaussian
from bayeslora.posteriors.provenance import origin_of
from bayeslora.tasks.types import Example, Format, ReadoutName, Split, Task

VOCABULARY = 80
COLOURS = ("red", "blue", "dark green", "pale old gold")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are a word with its space, a digit or a sign."""
    words = {"<pad>": 0, "<unk>": 1, "</s>": 2}
    for text in [
        *"ABCDEFG",
        "Question",
        "Answer",
        "red",
        "blue",
        "dark",
        "green",
        "pale",
        "old",
        "gold",
        "bag",
        "holds",
    ]:
        words.setdefault(text, len(words))
        words.setdefault(" " + text, len(words))
    for text in [*"0123456789", *":.,\n", " "]:
        words.setdefault(text, len(words))
    for text in [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
    ]:
        words |= {text: len(words), " " + text: len(words) + 1}  # whatever a model says is a word
    assert len(words) == VOCABULARY
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[0-9]|[^A-Za-z0-9]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=128
    )


def make_base(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of two layers with its own seed, so that every call gives the same one."""
    size = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        match kind:
            case "llama":
                model = LlamaForCausalLM(
                    LlamaConfig(
                        **size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, max_position_embeddings=128,
                    )
                )  # fmt: skip
            case "qwen2":
                model = Qwen2ForCausalLM(
                    Qwen2Config(
                        **size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
                    )
                )  # fmt: skip
            case "gpt2":
                model = GPT2LMHeadModel(GPT2Config(**size, n_embd=32, n_layer=2, n_head=4, n_positions=128))
            case "bert":
                model = BertForSequenceClassification(
                    BertConfig(
                        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=48,
                        num_labels=3, max_position_embeddings=128,
                    )
                )  # fmt: skip
            case _:
                raise ValueError(kind)
    return model.to(dtype)


TARGETS = {"llama": ["q_proj", "v_proj"], "qwen2": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"]}


def make_model(kind: str = "llama", dtype: torch.dtype = torch.float32, **lora: Any) -> PeftModel:
    """A tiny base with a LoRA adapter whose B is not zero, so that the adapter matters."""
    options = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS[kind], **lora}
    task_type = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(make_base(kind, dtype), LoraConfig(task_type=task_type, **options))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.3)
    return model


def make_split(
    name: str, rows: int, seed: int, *, classes: bool, readout: ReadoutName = "auto", before: str = "", **form: Any
) -> Split:
    """Bags of marbles: questions whose number of choices changes from row to row, or texts with three classes."""
    rng = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(rows):
        a, b, c = torch.randint(0, 10, (3,), generator=rng).tolist()
        text = f"{before}bag holds {a} red, {b} blue" + (f", {c} green." if c % 2 else ".")
        if classes:
            examples.append(Example(text, ("red", "blue", "green"), max(range(3), key=(a, b, c).__getitem__)))
        else:
            examples.append(Example(text, COLOURS[: 3 + c % 2], int(b > a)))
    if classes:
        form["kind"] = "class"
    return Split(
        f"bags/{name}",
        tuple(examples),
        Format(template="", readout=readout, **form),
        ("red", "blue", "green") if classes else None,
    )


def make_task(*, classes: bool = False, readout: ReadoutName = "auto", rows: int = 24) -> Task:
    """A task with three splits."""
    return Task(
        "bags",
        *(make_split(n, k, s, classes=classes, readout=readout) for n, k, s in
          (("train", rows, 0), ("validation", 8, 1), ("test", 13, 2))),
    )  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One row of the matrix of models: architecture, dtype and readout."""

    model: str
    dtype: torch.dtype = torch.float32
    readout: ReadoutName = "auto"

    def base(self) -> Any:
        return make_base(self.model, self.dtype)

    def build(self, **lora: Any) -> PeftModel:
        return make_model(self.model, self.dtype, **lora)

    def task(self, rows: int = 24) -> Task:
        return make_task(classes=self.model == "bert", readout=self.readout, rows=rows)


KINDS = {
    "llama-letters": Kind("llama", readout="letters"),
    "llama-likelihood": Kind("llama", readout="likelihood"),
    "llama-bf16": Kind("llama", torch.bfloat16, "likelihood"),
    "qwen2": Kind("qwen2", readout="likelihood"),
    "gpt2": Kind("gpt2", readout="letters"),
    "bert": Kind("bert"),
    "bert-bf16": Kind("bert", torch.bfloat16),
}


CHECKPOINTING = (
    f"{'activation' if hasattr(TrainingArguments, 'activation_checkpointing') else 'gradient'}_checkpointing"
)
"""What the installed transformers calls that layers are run again in the backward pass."""


def arguments(folder: Any, **changes: Any) -> TrainingArguments:
    """Arguments of a run that takes a second and writes nothing unless asked."""
    options = {
        "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True, "seed": 3,
    }  # fmt: skip
    return TrainingArguments(str(folder), **(options | changes))


def state_of(model: Any) -> dict[str, Any]:
    """Everything about a model that whoever changes it has to put back."""
    modules = dict(model.named_modules())
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": {name: module.training for name, module in modules.items()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in modules.items()
        },
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
    }


def same_params(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of parameters are the same bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same_state(model: Any, before: dict[str, Any]) -> bool:
    """Whether a model is as it was when `state_of` was asked."""
    now = state_of(model)
    return same_params(now.pop("weights"), before["weights"]) and all(now[key] == before[key] for key in now)


def gaussian(model: Any) -> DiagonalGaussian:
    """A posterior with some noise around the adapter that a model has."""
    mean = read(model)
    return DiagonalGaussian(mean, {n: torch.full_like(m, 0.01) for n, m in mean.items()}, origin_of(model, "test"))
