"""Requests that are made of the server's worker directly, and the tiny models that it batches."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from bayeslora.integrations.server import Limits
from bayeslora.integrations.server.decoding import Generation, Row, TokenNote
from bayeslora.integrations.server.worker import Worker
from support.serving import served
from support.tiny import make_model

SIZE = {
    "vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}


def make(kind: str) -> Any:
    """A tiny model of an architecture, with an adapter that matters."""
    targets = ["q_proj", "v_proj"]
    match kind:
        case "qwen3":
            config: Any = transformers.Qwen3Config(**SIZE)
        case "gemma3":
            config = transformers.Gemma3TextConfig(**SIZE, **WINDOW)
        case "mistral":
            config = transformers.MistralConfig(**SIZE, sliding_window=5)
        case "mamba":
            size = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 80}
            config, targets = transformers.MambaConfig(**size, pad_token_id=0, eos_token_id=2), ["x_proj"]
        case "lfm2":
            config = transformers.Lfm2Config(**SIZE, layer_types=["conv", "full_attention"])
        case _:
            return make_model(kind)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        base = transformers.AutoModelForCausalLM.from_config(config)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p.data, std=0.3)
    return model.eval()


@contextmanager
def working(tokenizer: Any, model: Any = None, **limits: Any) -> Iterator[Worker]:
    """A worker with a tiny model."""
    worker = Worker(served(tokenizer, model=model), Limits(**limits))
    try:
        yield worker
    finally:
        worker.close()
        tokenizer.chat_template = None
        assert not worker.thread.is_alive()


class Asked:
    """A request of n rows."""

    def __init__(
        self,
        worker: Worker,
        ids: list[int],
        tokens: int = 8,
        *,
        model: str = "tiny",
        draws: int = 3,
        n: int = 1,
        seed: int = 0,
        deadline: float = math.inf,
        **how: Any,
    ) -> None:
        settings = {"temperature": 0.0, "top_p": 1.0, "stops": (), **how}
        self.seen, self.done, self.left = threading.Event(), threading.Event(), n
        rows = [Row(ids, tokens, seed=seed + k, on_token=self._on_token, **settings) for k in range(n)]
        self.job = Generation(model, draws, rows, deadline)
        worker.submit(self.job)

    def _on_token(self, note: TokenNote | None) -> None:
        self.seen.set()
        self.left -= note is None
        if not self.left:
            self.done.set()

    def wait(self) -> Asked:
        assert self.done.wait(60)
        return self

    @property
    def ids(self) -> list[list[int]]:
        return [[note.id for note in row.notes] for row in self.job.rows]

    @property
    def log_probs(self) -> list[float]:
        return [note.log_prob for row in self.job.rows for note in row.notes]
