"""Every method on 8-bit and 4-bit bases (bitsandbytes, on the CPU too)."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from support.methods_table import DROPOUT, LM, TABLE
from support.tiny import CHECKPOINTING, TARGETS, arguments, gaussian, make_task, same_params
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from bayeslora.params import initialise, lora_parameters, read, swapped
from bayeslora.posteriors.loading import load_posterior
from bayeslora.prediction import PassOptions, predict
from bayeslora.prediction.generation import generate
from bayeslora.training.run import fit
from bayeslora.training.trainer_kwargs import kwargs_for

pytest.importorskip("bitsandbytes")

BITS = {
    "8-bit": {"load_in_8bit": True},
    "4-bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
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


def quantised(folder, bits, dropout=0.0):
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**BITS[bits]), dtype=torch.float32, device_map="cpu"
    )
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    lora = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS["llama"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**lora, lora_dropout=dropout))
    assert "bit" in type(model.base_model.model.model.layers[0].self_attn.q_proj).__name__
    initialise(model, 0)
    return model


@pytest.mark.parametrize("name", [row.param() for row in TABLE.values() if LM in row.kinds])
@pytest.mark.parametrize("bits", BITS)
def test_a_method_learns_on_a_quantised_base(bits, name, folder, tokenizer, tmp_path):
    # the readout passes over the model in evaluation mode first, after which every layer must still learn
    checkpointing = name in ("ivon", "blob")
    model, task, method = quantised(folder, bits, DROPOUT), make_task(readout="likelihood"), TABLE[name].method
    before = read(model)
    args = arguments(
        tmp_path / "run", **{CHECKPOINTING: checkpointing}, gradient_accumulation_steps=2, max_steps=4,
        per_device_train_batch_size=2,
    )  # fmt: skip
    posterior = fit(model, task, method, args, tokenizer=tokenizer)
    assert not any(torch.equal(posterior.mean[n], before[n]) for n in before)
    assert all(p.dtype == torch.float32 for p in lora_parameters(model).values())
    posterior.save_pretrained(tmp_path / "posterior")
    back = load_posterior(tmp_path / "posterior")
    assert same_params(back.draw(1), posterior.draw(1))
    found = predict(model, back, task.test, draws=2, tokenizer=tokenizer)
    assert bool(found.log_probs.exp().sum(-1).sub(1).abs().max() < 1e-4)
    if posterior.distinct is None:
        assert not torch.equal(found.log_probs[0], found.log_probs[1])


@pytest.mark.parametrize("bits", BITS)
def test_stacked_draws_answer_as_the_loop_does_on_a_quantised_base(bits, folder, tokenizer):
    model, split = quantised(folder, bits), make_task(readout="likelihood").test
    posterior = gaussian(model)
    together = predict(model, posterior, split, 3, tokenizer=tokenizer)
    one_by_one = predict(model, posterior, split, 3, tokenizer=tokenizer, options=PassOptions(stack=False))
    assert float((one_by_one.probs - one_by_one.mean_log_probs.exp()).abs().max()) > 1e-3
    torch.testing.assert_close(together.log_probs, one_by_one.log_probs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_a_posterior_is_read_on_the_base_in_full_precision(bits, folder, tokenizer):
    model, split = quantised(folder, bits), make_task(readout="likelihood").test
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS["llama"], task_type="CAUSAL_LM")
    plain = get_peft_model(LlamaForCausalLM.from_pretrained(folder), lora)
    ours, theirs = (predict(one, gaussian(model), split, 3, tokenizer=tokenizer) for one in (model, plain))
    assert 0 < float((ours.probs - theirs.probs).abs().max()) < 0.05  # the quantisation


@pytest.mark.parametrize("bits", BITS)
def test_text_is_generated_from_the_average_of_plain_passes(bits, folder, tokenizer):
    model, prompt = quantised(folder, bits), "Question: bag holds 3 red, 5 blue"
    posterior = gaussian(model)
    model.get_base_model().generation_config.eos_token_id = None  # a text of full length
    (answer,) = generate(model, posterior, [prompt], 3, tokenizer=tokenizer, max_new_tokens=5)
    ids, found = tokenizer(prompt)["input_ids"], []
    for k in range(3):
        with swapped(model, posterior.draw(k)), torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([ids + list(answer.token_ids)])).logits[0, len(ids) - 1 : -1]
        found.append(logits.float().log_softmax(-1).exp())
    average = torch.stack(found).mean(0)
    assert average.argmax(-1).tolist() == list(answer.token_ids)
    torch.testing.assert_close(answer.log_probs, average.max(-1).values.log(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("trainer", [SFTTrainer, DPOTrainer])
@pytest.mark.parametrize("name", ["map", "swag", "ivon", "blob"])
def test_a_method_learns_in_trl_which_casts_the_adapter(name, trainer, folder, tokenizer, tmp_path):
    model, method = quantised(folder, "4-bit"), TABLE[name].method
    before = read(model)
    config = SFTConfig if trainer is SFTTrainer else DPOConfig
    row = {"prompt": "Question: bag holds 3 red.\nAnswer:"}
    row |= {"completion": " red"} if trainer is SFTTrainer else {"chosen": " red", "rejected": " blue"}
    args = config(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, **{CHECKPOINTING: True},
    )  # fmt: skip
    kwargs = kwargs_for(trainer, method, model, 8)
    run = trainer(model, args=args, train_dataset=Dataset.from_list([row] * 8), processing_class=tokenizer, **kwargs)
    run.train()
    posterior = method.posterior(run.model)
    kept = torch.bfloat16 if name == "map" else torch.float32  # a plain fine-tune is the Trainer's own affair
    assert all(p.dtype == kept for p in lora_parameters(model).values())
    assert not any(torch.equal(posterior.mean[n], before[n]) for n in before)
    found = predict(model, posterior, make_task(readout="likelihood").test, draws=2, tokenizer=tokenizer)
    assert bool(found.log_probs.exp().sum(-1).sub(1).abs().max() < 1e-4)
    if posterior.distinct is None:
        assert not torch.equal(found.log_probs[0], found.log_probs[1])
