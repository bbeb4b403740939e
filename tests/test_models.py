"""Loading a base model with a fresh adapter: what kind it becomes, and what is refused."""

import functools

import pytest
import torch
from peft import PeftModel
from support.tiny import make_base, make_tokenizer

from bayeslora.errors import InputError
from bayeslora.models import adapter_of, cache_argument, default_device, fast_dtype, load_model
from bayeslora.posteriors.provenance import origin_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for kind in ("llama", "bert", "gpt2"):
        make_base(kind).save_pretrained(path / kind)
        make_tokenizer().save_pretrained(path / kind)
    return path


def test_a_causal_model_stays_one_and_only_its_adapter_is_trained(folder):
    model, tokenizer = load_model(folder / "llama", target_modules=["q_proj"], rank=3, alpha=6, device="cpu")
    assert isinstance(model, PeftModel)
    assert type(model.get_base_model()).__name__ == "LlamaForCausalLM"
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and "q_proj" in name and 3 in p.shape for name, p in trained.items())
    assert len(trained) == 4
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert tokenizer.pad_token_id is not None


@pytest.mark.parametrize(("kind", "readout"), [("bert", "auto"), ("llama", "head")])
def test_classes_become_the_heads_labels(folder, kind, readout):
    model, _ = load_model(folder / kind, ["no", "yes"], readout=readout, target_modules=None, dtype=torch.float32)
    config = model.get_base_model().config
    assert config.id2label == {0: "no", 1: "yes"}
    assert config.num_labels == 2
    assert config.pad_token_id is not None


def test_the_base_has_the_dtype_that_is_asked_for_and_the_adapter_float32(folder):
    model, _ = load_model(folder / "llama", dtype=torch.bfloat16, device="cpu", target_modules=["q_proj"])
    dtypes = {("lora_" in name, p.dtype) for name, p in model.named_parameters()}
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}


def test_a_kept_configuration_gives_the_adapter_that_it_was_kept_of(folder):
    one, _ = load_model(folder / "llama", rank=3, alpha=5, dropout=0.2, target_modules=["q_proj", "v_proj"])
    config = origin_of(one).adapter_config
    other, _ = load_model(folder / "llama", adapter=adapter_of(dict(config) | {"of_a_later_peft": 1}))
    assert {n: p.shape for n, p in one.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    assert origin_of(other).adapter_config == config
    assert any(p.requires_grad for p in other.parameters())


def test_half_precision_of_16_bits_with_a_small_exponent_is_never_chosen():
    assert fast_dtype("cpu") in (torch.bfloat16, torch.float32)
    assert fast_dtype("meta") == torch.float32
    assert default_device().type in ("cpu", "cuda", "mps", "xpu")


def test_a_classifier_without_classes_is_refused(folder):
    with pytest.raises(InputError, match="the task has no classes"):
        load_model(folder / "bert")


def test_layers_that_are_not_there_are_refused(folder):
    with pytest.raises(InputError, match="the adapter does not fit"):
        load_model(folder / "llama", target_modules=["nothing"])


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_model_is_refused(folder, tmp_path, file):
    import shutil

    broken = shutil.copytree(folder / "llama", tmp_path / "broken")
    (broken / file).write_bytes((broken / file).read_bytes()[:40])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(broken, target_modules=["q_proj"])


def test_keys_and_values_go_under_the_name_that_a_model_takes():
    def former(input_ids, past_key_values=None):
        """Takes the old name."""

    @functools.wraps(lambda input_ids, cache=None: None)
    def renamed(*args, **kwargs):
        """Takes the new name, inside of a decorator that goes on taking the old one."""

    def of_states(input_ids, cache_params=None):
        pass

    names = [cache_argument(call) for call in (former, renamed, of_states)]
    assert names == ["past_key_values", "cache", "cache_params"]
