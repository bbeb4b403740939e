"""Tiny preferences, and a tiny model that rewards texts."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from support.tiny import COLOURS, TARGETS

ROWS = 16
PAIRS = [
    {
        "prompt": f"Question: bag holds {n} red, {n % 7} blue.\nAnswer:",
        "chosen": " " + COLOURS[n % 4],
        "rejected": " " + COLOURS[(n + 1) % 4],
    }
    for n in range(ROWS)
]
TEXTS = [row["prompt"] + row[side] for row in PAIRS[:5] for side in ("chosen", "rejected")]


def reward_model(**lora: Any) -> PeftModel:
    """A tiny Llama with one output; PEFT trains and keeps the head with the adapter."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
    config = LlamaConfig(
        **size, vocab_size=80, num_attention_heads=4, num_key_value_heads=2, num_labels=1, pad_token_id=0,
        bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    options = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS["llama"], **lora}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(LlamaForSequenceClassification(config), LoraConfig(task_type="SEQ_CLS", **options))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)
    return model
