"""What a user can get wrong, and that it is said in words and nothing is lost."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tiny import KINDS, arguments, make_base, make_model, make_task, make_tokenizer, same_params
from tokenizers import Regex, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, TrainerCallback

from bayeslora import storage
from bayeslora.errors import InputError, Interrupted
from bayeslora.fit import fit
from bayeslora.methods import Ensemble, Map, Swag
from bayeslora.operations import draw_count
from bayeslora.origin import origin_of
from bayeslora.params import initialise, read
from bayeslora.posteriors import DiagonalGaussian, Mixture, Point, Posterior
from bayeslora.predict import predict, readout_for
from bayeslora.storage import export_draws, load_posterior
from bayeslora.tasks.types import Example, Format, Split


def gaussian(model: Any) -> DiagonalGaussian:
    mean = read(model)
    return DiagonalGaussian(mean, {n: torch.full_like(m, 0.01) for n, m in mean.items()}, origin_of(model, "test"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A posterior on disk."""
    gaussian(make_model()).save_pretrained(tmp_path / "posterior")
    return tmp_path / "posterior"


# files


def change(path: Path, **values: Any) -> None:
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def flip(path: Path) -> None:
    """Change one bit of the last tensor."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not a posterior": (lambda f: (f / "posterior_config.json").unlink(), "is not a posterior of bayeslora"),
    "config cut": (lambda f: (f / "posterior_config.json").write_text('{"family": "Po'), "cannot be read"),
    "config no object": (lambda f: (f / "posterior_config.json").write_text("[1]"), "does not hold a JSON object"),
    "config not text": (lambda f: (f / "posterior_config.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "adapter missing": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "spread missing": (lambda f: (f / "posterior.safetensors").unlink(), "posterior.safetensors is missing"),
    "adapter config missing": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "adapter changed": (lambda f: flip(f / "adapter_model.safetensors"), "adapter_model.safetensors is damaged"),
    "spread changed": (lambda f: flip(f / "posterior.safetensors"), "posterior.safetensors is damaged"),
    "spread cut": (lambda f: os.truncate(f / "posterior.safetensors", 100), "posterior.safetensors is damaged"),
    "later format": (lambda f: change(f / "posterior_config.json", format_version=9), "format version 9"),
    "unknown family": (lambda f: change(f / "posterior_config.json", family="Cauchy"), "names the family 'Cauchy'"),
    "part lacking": (lambda f: change(f / "posterior_config.json", family="LowRankGaussian"), "lacks a part"),
    "no scalars": (lambda f: change(f / "posterior_config.json", scalars=None), "lacks a part"),
    "no fingerprint": (lambda f: change(f / "posterior_config.json", fingerprint=None), "fingerprint"),
    "checksums of no kind": (lambda f: change(f / "posterior_config.json", sha256=["x"]), "sha256"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_posterior_is_refused_and_the_file_named(saved: Path, damage: str) -> None:
    harm, said = DAMAGE[damage]
    harm(saved)
    with pytest.raises(InputError, match=said) as caught:
        load_posterior(saved)
    assert str(saved) in str(caught.value)


def test_values_that_cannot_be_are_refused_even_with_the_right_checksum(tmp_path: Path) -> None:
    posterior = gaussian(make_model())
    next(iter(posterior.variance.values())).fill_(-1.0)  # behind the back of the frozen dataclass
    posterior.save_pretrained(tmp_path / "p")
    with pytest.raises(InputError, match="negative"):
        load_posterior(tmp_path / "p")


def test_cut_safetensors_are_refused_even_with_the_right_checksum(saved: Path) -> None:
    os.truncate(saved / "posterior.safetensors", 100)
    change(saved / "posterior_config.json", sha256={})
    with pytest.raises(InputError, match="cannot be read"):
        load_posterior(saved)


def test_a_mixture_with_a_member_missing_is_refused(tmp_path: Path) -> None:
    model = make_model()
    Mixture((gaussian(model), gaussian(model)), origin_of(model)).save_pretrained(tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / "member-1")
    with pytest.raises(InputError, match="member-1"):
        load_posterior(tmp_path / "m")


def test_a_name_that_is_neither_folder_nor_repository_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="neither a folder nor a repository"):
        load_posterior("no/such/folder/at all")


def test_a_posterior_without_an_origin_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without an origin"):
        Point(read(make_model())).save_pretrained(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_kept_unless_it_may_be_replaced(saved: Path) -> None:
    model = make_model()
    other = Point({n: 2 * p for n, p in read(model).items()}, origin_of(model))
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        other.save_pretrained(saved)
    assert (saved / "notes.txt").read_text() == "mine"
    other.save_pretrained(saved, overwrite=True)
    assert same_params(load_posterior(saved).mean, other.mean)
    assert os.listdir(saved.parent) == [saved.name]


def test_an_empty_folder_may_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    gaussian(make_model()).save_pretrained(tmp_path / "p")
    assert os.listdir(tmp_path) == ["p"]
    load_posterior(tmp_path / "p")


def test_a_file_in_the_way_is_refused_and_replaced_when_allowed(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        gaussian(make_model()).save_pretrained(tmp_path / "p")
    assert (tmp_path / "p").read_text() == "mine"
    gaussian(make_model()).save_pretrained(tmp_path / "p", overwrite=True)
    assert os.listdir(tmp_path) == ["p"]
    load_posterior(tmp_path / "p")


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        gaussian(make_model()).save_pretrained(tmp_path / "file" / "p")


def fails_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Make one call of a function fail as it does on a full disk."""
    real, count = getattr(owner, name), 0

    def full(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, full)


FULL = [(storage, "save_file", 1), (storage, "save_file", 2), (storage, "_write_json", 2), (storage.os, "replace", 1)]


@pytest.mark.parametrize(("owner", "name", "call"), FULL, ids=lambda value: str(getattr(value, "__name__", value)))
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int
) -> None:
    posterior = gaussian(make_model())
    fails_at(monkeypatch, owner, name, call)
    with pytest.raises(InputError, match="No space left"):
        posterior.save_pretrained(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [*FULL, (storage.os, "replace", 2)],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_a_full_disk_leaves_the_old_folder_as_it_was(
    saved: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int
) -> None:
    old = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = make_model()
    fails_at(monkeypatch, owner, name, call)
    changed = replace(gaussian(model), mean={n: 2 * p for n, p in read(model).items()})
    with pytest.raises(InputError, match="No space left"):
        changed.save_pretrained(saved, overwrite=True)
    monkeypatch.undo()
    assert os.listdir(saved.parent) == [saved.name]
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == old


def test_a_full_disk_leaves_no_exported_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_at(monkeypatch, storage, "save_file", 3)
    with pytest.raises(InputError, match="No space left"):
        export_draws(gaussian(make_model()), tmp_path / "draws", 5)
    assert list(tmp_path.iterdir()) == []


# models

LM_TASK = make_task(readout="likelihood")


@pytest.fixture
def asked(tokenizer: Any) -> Callable[..., Any]:
    """Predict with a posterior over the usual tiny model."""

    def ask(model: Any, posterior: Posterior | None = None, split: Split = LM_TASK.test) -> Any:
        return predict(model, posterior or gaussian(make_model()), split, draws=1, tokenizer=tokenizer)

    return ask


def other_weights() -> Any:
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: make_model("qwen2"), "other layers; load that base model"),
        (other_weights, "same layers with other weights; load that base model"),
        (lambda: make_model(r=4), r"has shape \(2, 32\), the model's adapter \(4, 32\)"),
        (lambda: make_model(target_modules=["q_proj"]), "the model's adapter has no parameter .*v_proj"),
        (lambda: make_model(target_modules=["q_proj", "v_proj", "o_proj"]), "the posterior has no tensor .*o_proj"),
        (lambda: make_base("llama"), "LlamaForCausalLM without an adapter"),
        (
            lambda: get_peft_model(
                make_base("llama"),
                IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]),
            ),
            "of type IA3",
        ),
    ],
    ids=["layers", "weights", "rank", "fewer targets", "more targets", "no adapter", "IA3"],
)
def test_a_model_that_does_not_fit_is_refused(asked: Any, make: Callable[[], Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        asked(make())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_another_precision_is_the_same_base(asked: Any, dtype: torch.dtype) -> None:
    assert asked(make_model(dtype=dtype)).draws == 1


@pytest.mark.parametrize("method", [Map(), Swag(), Ensemble(2)], ids=lambda m: m.name)
def test_training_without_an_adapter_is_refused(method: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without an adapter"):
        fit(make_base("llama"), LM_TASK, method, arguments(tmp_path), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
    ],
    ids=str,
)
def test_an_ensemble_of_adapters_without_a_second_start_is_refused(
    lora: dict[str, Any], said: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        fit(make_model(**lora), LM_TASK, Ensemble(2), arguments(tmp_path), tokenizer=tokenizer)


def test_swag_serves_dora(tokenizer: Any, tmp_path: Path) -> None:
    model = make_model(use_dora=True)
    posterior = fit(model, LM_TASK, Swag(), arguments(tmp_path), tokenizer=tokenizer)
    assert any("magnitude" in name for name in posterior.mean)
    assert predict(model, posterior, LM_TASK.test, draws=2, tokenizer=tokenizer).draws == 2


def test_dropout_draws_of_an_adapter_without_dropout_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lora_dropout"):
        fit(make_model(), LM_TASK, Ensemble(1, dropout_draws=True), arguments(tmp_path), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Ensemble(0), "at least 1 member"),
        (lambda: Ensemble(2, Ensemble(2)), "cannot be ensembles"),
        (lambda: Ensemble(2, Swag(), dropout_draws=True), "members that are points"),
    ],
)
def test_an_ensemble_without_meaning_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


def test_an_adapter_of_another_start_is_refused_before_it_is_written() -> None:
    model = make_model(use_dora=True)
    before = read(model)
    with pytest.raises(InputError, match="DoRA"):
        initialise(model, 0)
    assert same_params(read(model), before)


def test_the_adapters_dtype_does_not_matter_to_what_is_read() -> None:
    model = make_model()
    assert all(p.dtype == torch.float32 for p in read(model.half()).values())


# examples


def one(text: str = "bag holds 1 red, 2 blue.", choices: tuple[str, ...] = ("red", "blue"), **form: Any) -> Split:
    return Split("bags/test", (Example(text, choices, 0),), Format(**({"template": ""} | form)))


def test_a_split_without_examples_is_refused(asked: Any) -> None:
    with pytest.raises(InputError, match="bags/test has no examples"):
        asked(make_model(), split=LM_TASK.test.take([]))


def test_a_choice_that_becomes_no_token_is_refused(tokenizer: Any) -> None:
    strips = make_tokenizer()
    strips.backend_tokenizer.normalizer = normalizers.Strip(left=False, right=True)
    readout = readout_for(make_model(), one(readout="likelihood"), strips)
    with pytest.raises(InputError, match="row 0 of bags/test: the choice ' ' becomes no token"):
        readout.encode(one(choices=("red", ""), readout="likelihood"))


def test_a_choice_that_grows_together_with_the_prompt_is_refused() -> None:
    lines = make_tokenizer()
    lines.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[^\n]+|\n"), "isolated")
    lines.backend_tokenizer.model = models.WordLevel({"<unk>": 0, "Answer:": 1, "\n": 2}, unk_token="<unk>")
    split = one(readout="likelihood")
    with pytest.raises(InputError, match=r"row 0 of bags/test: .* become one token"):
        readout_for(make_model(), split, lines).encode(split)


def test_letters_that_are_no_tokens_of_their_own_are_refused(tokenizer: Any) -> None:
    split = one(choices=tuple("123456789"), readout="letters")  # the vocabulary ends with G
    with pytest.raises(InputError, match="letters are not one token each"):
        readout_for(make_model(), split, tokenizer).encode(split)


LONG = "bag holds " + "1 red, " * 60 + "2 blue."


@pytest.mark.parametrize("readout", ["letters", "likelihood"])
def test_a_prompt_longer_than_the_model_is_refused_or_cut_and_counted(asked: Any, readout: str) -> None:
    model = make_model()
    with pytest.raises(InputError, match=r"row 0 of bags/test has \d+ tokens, and the model reads at most"):
        asked(model, split=one(LONG, readout=readout))
    split = one(LONG, readout=readout, max_length=10_000)
    both = replace(split, examples=(*split.examples, *one().examples))
    assert asked(model, split=both).truncated == 1


def test_a_long_text_for_a_classification_head_is_refused_or_cut_and_counted(tokenizer: Any) -> None:
    model = KINDS["bert"].build()
    point = Point(read(model), origin_of(model))
    split = Split("bags/test", (Example(LONG, ("a", "b", "c")),), Format("{text}"), ("a", "b", "c"))
    with pytest.raises(InputError, match="the model reads at most 128"):
        predict(model, point, split, tokenizer=tokenizer)
    cut = replace(split, format=Format("{text}", max_length=64))
    assert predict(model, point, cut, tokenizer=tokenizer).truncated == 1


def test_an_answer_longer_than_the_model_is_refused(asked: Any) -> None:
    split = one(choices=("red", "dark " * 200 + "green"), readout="likelihood", max_length=64)
    with pytest.raises(InputError, match="row 0 of bags/test has a choice longer than the model's 128 tokens"):
        asked(make_model(), split=split)


def test_a_prompt_of_no_tokens_is_refused(asked: Any) -> None:
    for split in (one("", template="{text}", readout="likelihood"), one(readout="likelihood", max_length=0)):
        with pytest.raises(InputError, match="row 0 of bags/test has a prompt without a token"):
            asked(make_model(), split=split)


def classes(count: int, readout: str = "auto") -> Split:
    names = ("red", "blue", "green", "gold")[:count]
    return Split("bags/test", (Example("bag", names, 0),), Format("", readout, kind="class"), names)


def headless() -> Any:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = LlamaModel(LlamaConfig(vocab_size=80, **size))
    return get_peft_model(base, LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("make", "split", "said"),
    [
        (KINDS["bert"].build, classes(4), "has 4 classes, the model's head 3; load the model with num_labels=4"),
        (KINDS["bert"].build, classes(3, "letters"), "'letters' does not fit a BertForSequenceClassification"),
        (KINDS["bert"].build, one(), "choices that change from row to row"),
        (make_model, classes(3, "head"), "'head' does not fit a LlamaForCausalLM"),
        (headless, one(), "LlamaModel has no language model head"),
    ],
    ids=["classes", "letters with head", "choices with head", "head without head", "headless"],
)
def test_a_readout_that_does_not_fit_the_model_is_refused(
    make: Callable[[], Any], split: Split, said: str, tokenizer: Any
) -> None:
    with pytest.raises(InputError, match=said):
        readout_for(make(), split, tokenizer)


def test_a_head_without_a_padding_token_is_refused() -> None:
    bare = make_tokenizer()
    bare.pad_token = None
    with pytest.raises(InputError, match="padding token"):
        readout_for(KINDS["bert"].build(), classes(3), bare)


def test_a_model_without_a_saved_tokenizer_is_asked_for_one() -> None:
    with pytest.raises(InputError, match="pass tokenizer="):
        readout_for(make_model(), one())


def test_no_draws_are_refused(asked: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="draws must be at least 1"):
        predict(make_model(), gaussian(make_model()), LM_TASK.test, draws=0, tokenizer=tokenizer)
    assert draw_count(gaussian(make_model()), 1) == 1


# training


def unlabelled(split: Split, row: int) -> Split:
    examples = list(split)
    examples[row] = replace(examples[row], label=None)
    return replace(split, examples=tuple(examples))


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (replace(LM_TASK, train=None), "has no training examples"),
        (replace(LM_TASK, train=LM_TASK.train.take([])), "has no training examples"),
        (replace(LM_TASK, train=unlabelled(LM_TASK.train, 3)), "row 3 of bags/train has no label"),
    ],
    ids=["no train", "empty", "label"],
)  # fmt: skip
def test_a_task_that_cannot_be_trained_on_is_refused(task: Any, said: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        fit(make_model(), task, Map(), arguments(tmp_path), tokenizer=tokenizer)


def test_evaluating_in_training_on_rows_without_labels_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    task = replace(LM_TASK, validation=unlabelled(LM_TASK.validation, 2))
    with pytest.raises(InputError, match="row 2 of bags/validation has no label"):
        fit(make_model(), task, Map(), arguments(tmp_path, eval_strategy="epoch"), tokenizer=tokenizer)


@pytest.mark.parametrize("method", [Map(), Ensemble(2)], ids=lambda m: m.name)
def test_a_number_of_starts_that_is_not_the_number_of_runs_is_refused(
    method: Any, tokenizer: Any, tmp_path: Path
) -> None:
    starts = [Point(read(make_model()))] * 3
    with pytest.raises(InputError, match="3 starts were given"):
        fit(make_model(), LM_TASK, method, arguments(tmp_path), tokenizer=tokenizer, start=starts)


class Press(TrainerCallback):
    """Ctrl-C, so many times in one step."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.step, self.times = step, times

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            for _press in range(self.times):
                signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("method", [Swag(start=2, interval=1), Map(), Ensemble(2, Map())], ids=lambda m: m.name)
def test_ctrl_c_writes_a_checkpoint_from_which_the_uninterrupted_result_follows(
    method: Any, tokenizer: Any, tmp_path: Path
) -> None:
    def train(folder: str, **more: Any) -> Posterior:
        model = make_model(lora_dropout=0.1)
        return fit(model, LM_TASK, method, arguments(tmp_path / folder), tokenizer=tokenizer, **more)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped at step 6 with a checkpoint"):
        train("stopped", callbacks=[Press(5)])
    assert signal.getsignal(signal.SIGINT) is handler
    resumed, whole = train("stopped", resume=True), train("whole")
    for k in range(3):
        assert same_params(resumed.draw(k), whole.draw(k))


def test_a_second_ctrl_c_stops_at_once(tokenizer: Any, tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(
            make_model(), LM_TASK, Map(), arguments(tmp_path), tokenizer=tokenizer, callbacks=[Press(3, times=2)]
        )  # fmt: skip
    assert caught.type is KeyboardInterrupt
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("method", [Map(kl=0.5), Swag()], ids=lambda m: m.name)
def test_a_run_that_breaks_off_leaves_no_hook_in_the_model(method: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        fit(model, LM_TASK, method, arguments(tmp_path), tokenizer=tokenizer, callbacks=[Press(3, times=2)])
    gc.collect()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
