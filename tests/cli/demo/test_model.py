"""Facts about the demo's models themselves: the conversion, the copy, and that the real ones work."""

import importlib.util
import socket
import subprocess

import huggingface_hub
import pytest
import torch
from support.downloads import forbidden
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from bayeslora.cli.demo import download
from bayeslora.cli.demo import model as module
from bayeslora.cli.demo.download import NEEDED
from bayeslora.cli.demo.model import MINILM, SMOLLM2, demo_encoder, demo_model
from bayeslora.errors import InputError
from bayeslora.tasks.synthetic import chance_ood, chance_task


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(download, "from_hub", lambda published: None)


@pytest.mark.usefixtures("no_hub")
def test_a_missing_gguf_is_named_before_anything_is_fetched(tmp_path, monkeypatch):
    specs = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else specs(name))
    monkeypatch.setattr(subprocess, "run", forbidden)
    with pytest.raises(InputError, match=r"pip install 'bayeslora\[demo\]'"):
        demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_hub")
def test_the_encoder_needs_no_gguf(tmp_path, monkeypatch):
    specs = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: forbidden() if name == "gguf" else specs(name))
    monkeypatch.setattr(download, "from_package", lambda published, root, make: root / published.folder)
    assert demo_encoder(tmp_path) == tmp_path / MINILM.folder


def test_the_two_models_share_no_folder():
    assert SMOLLM2.folder != MINILM.folder


def test_of_the_encoders_package_only_the_files_of_the_model_are_copied(tmp_path):
    package = tmp_path / "package"
    for name in ("__init__.py", *(f"model/{name}" for name in (*NEEDED, "README.md", "vocab.txt"))):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(name)
    module.copy_package(package, tmp_path / "made")
    copied = {path.name: path.read_text() for path in (tmp_path / "made").iterdir()}
    assert copied == {name: f"model/{name}" for name in NEEDED}


def test_mending_splits_digits_that_the_merges_would_join():
    vocabulary = {token: index for index, token in enumerate(["a", "1", "2", "12", "Ġ", "ĠĠ", "<|im_end|>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("1", "2"), ("Ġ", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.tokenize("a  12") == ["a", "Ġ", "Ġ", "12"]
    module.mend_tokenizer(tokenizer)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", "<|im_end|>", 8192)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.usefixtures("no_hub")
def test_the_converted_model_knows_the_capital_of_france_and_reads_as_smollm2_does(tmp_path):
    folder = demo_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert [path.name for path in tmp_path.iterdir()] == [SMOLLM2.folder]
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**prompt, max_new_tokens=6, do_sample=False)[0])
    assert tokenizer.tokenize("a  12 cats, 3.50") == ["a", "ĠĠ", "1", "2", "Ġcats", ",", "Ġ", "3", ".", "5", "0"]
    text = " two  spaces\n\t1984 naïve – ½"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert asked.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    task = chance_task()
    for example in (e for split in (task.train, task.validation, task.test, chance_ood()) for e in split):
        assert len(tokenizer(example.text)["input_ids"]) <= 45
        assert {len(tokenizer(f" {choice}")["input_ids"]) for choice in example.choices} == {1}


def tampered(folder):
    """Write the encoder's files, all there, but the weights are not the published ones."""
    folder.mkdir(parents=True)
    for name in NEEDED:
        (folder / name).write_text("tampered")
    return folder


def test_an_encoder_in_the_cache_whose_weights_are_not_the_published_ones_is_not_returned(tmp_path, monkeypatch):
    tampered(tmp_path / MINILM.folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "nothing"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(download, "from_package", lambda published, root, make: root / "made again")
    assert demo_encoder(tmp_path) == tmp_path / "made again"


def test_a_snapshot_whose_weights_are_not_the_published_ones_is_passed_over_with_a_warning(
    tmp_path, monkeypatch, caplog
):
    snapshot = tampered(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(download, "from_package", lambda published, root, make: root / "made")
    assert demo_encoder(tmp_path) == tmp_path / "made"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "is not the published model" in caplog.messages[0]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.usefixtures("no_hub")
def test_the_encoder_from_the_wheel_finds_sentences_that_mean_the_same(tmp_path, monkeypatch):
    folder = demo_encoder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [MINILM.folder]
    assert {path.name for path in folder.iterdir()} == set(NEEDED)
    monkeypatch.setattr(socket.socket, "connect", forbidden)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert tokenizer.tokenize("Fine-tuning naïve CATS") == ["fine", "-", "tuning", "naive", "cats"]
    assert (tokenizer.pad_token, tokenizer.cls_token, tokenizer.model_max_length) == ("[PAD]", "[CLS]", 512)
    sentences = ["The film was wonderful.", "I loved this movie.", "The train to Leeds leaves at noon."]
    encoded = tokenizer(sentences, padding=True, return_tensors="pt")
    assert encoded["input_ids"].shape[1] < 20
    with torch.no_grad():
        states, mask = model(**encoded).last_hidden_state, encoded["attention_mask"].unsqueeze(-1)
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    alike, other = means[0] @ means[1], means[0] @ means[2]
    assert alike > 0.6 > 0.2 > other
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    assert classifier(**encoded).logits.shape == (3, 2)
    assert demo_encoder(tmp_path) == folder
