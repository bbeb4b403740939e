"""Methods on 8-bit and 4-bit bases (bitsandbytes, on the CPU too)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods_table import TABLE
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tiny import TARGETS, arguments, gaussian, make_task, same_params
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from bayeslora.engine import predict
from bayeslora.params import initialise, live, read
from bayeslora.storage import load_posterior
from bayeslora.training import fit

pytest.importorskip("bitsandbytes")

BITS = {
    "8-bit": {"load_in_8bit": True},
    "4-bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("base")
    size = {"hidden_size": 64, "intermediate_size": 128}  # a row must be a whole block of 64 for 4-bit
    config = LlamaConfig(
        **size, vocab_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        bos_token_id=None, eos_token_id=2, max_position_embeddings=128,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    return path


def quantised(folder: Any, bits: str) -> Any:
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**BITS[bits]), dtype=torch.float32, device_map="cpu"
    )
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS["llama"], task_type="CAUSAL_LM"))
    assert "bit" in type(model.base_model.model.model.layers[0].self_attn.q_proj).__name__
    initialise(model, 0)
    return model


@pytest.mark.parametrize("name", ["map", "swag", "ivon", "blob", "blob-elbo", "laplace", "laplace-diagonal", "tfb"])
@pytest.mark.parametrize("bits", BITS)
def test_a_method_learns_on_a_quantised_base(bits: str, name: str, folder: Any, tokenizer: Any, tmp_path: Any) -> None:
    # the readout passes over the model in evaluation mode first, after which every layer must still learn
    checkpointing = name in ("ivon", "blob")
    model, task, method = quantised(folder, bits), make_task(readout="likelihood"), TABLE[name]
    before = read(model)
    args = arguments(
        tmp_path / "run", gradient_checkpointing=checkpointing, gradient_accumulation_steps=2, max_steps=4,
        per_device_train_batch_size=2,
    )  # fmt: skip
    posterior = fit(model, task, method, args, tokenizer=tokenizer)
    assert not any(torch.equal(posterior.mean[n], before[n]) for n in before)
    assert all(p.dtype == torch.float32 for p in live(model).values())
    posterior.save_pretrained(tmp_path / "posterior")
    back = load_posterior(tmp_path / "posterior")
    assert same_params(back.draw(1), posterior.draw(1))
    found = predict(model, back, task.test, draws=2, tokenizer=tokenizer)
    assert bool(found.log_probs.exp().sum(-1).sub(1).abs().max() < 1e-4)
    if posterior.distinct is None:
        assert not torch.equal(found.log_probs[0], found.log_probs[1])


@pytest.mark.parametrize("bits", BITS)
def test_stacked_draws_answer_as_the_loop_does_on_a_quantised_base(bits: str, folder: Any, tokenizer: Any) -> None:
    model, split = quantised(folder, bits), make_task(readout="likelihood").test
    posterior = gaussian(model)
    together = predict(model, posterior, split, 3, tokenizer=tokenizer)
    one_by_one = predict(model, posterior, split, 3, tokenizer=tokenizer, stack=False)
    assert float((one_by_one.probs - one_by_one.mean_log_probs.exp()).abs().max()) > 1e-3
    torch.testing.assert_close(together.log_probs, one_by_one.log_probs, rtol=0, atol=1e-4)
