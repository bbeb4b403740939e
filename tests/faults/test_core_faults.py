"""Models, adapters and examples that do not fit, and that it is said in words."""

from dataclasses import replace

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from support.tiny import KINDS, arguments, gaussian, make_base, make_model, make_task, make_tokenizer, same_params
from tokenizers import Regex, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaModel

from bayeslora.errors import InputError
from bayeslora.methods import Ensemble, Map, Swag
from bayeslora.params import initialise, read
from bayeslora.posteriors import Point
from bayeslora.posteriors.provenance import origin_of
from bayeslora.prediction import predict, readout_for
from bayeslora.tasks.types import Example, Format, Split
from bayeslora.training.run import fit

LM_TASK = make_task(readout="likelihood")


@pytest.fixture
def asked(tokenizer):
    """Predict with a posterior over the usual tiny model."""

    def ask(model, posterior=None, split=LM_TASK.test):
        return predict(model, posterior or gaussian(make_model()), split, draws=1, tokenizer=tokenizer)

    return ask


def other_weights():
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
def test_a_model_that_does_not_fit_is_refused(asked, make, said):
    with pytest.raises(InputError, match=said):
        asked(make())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_another_precision_is_the_same_base(asked, dtype):
    assert asked(make_model(dtype=dtype)).draws == 1


@pytest.mark.parametrize("method", [Map(), Swag(), Ensemble(2)], ids=lambda m: m.name)
def test_training_without_an_adapter_is_refused(method, tokenizer, tmp_path):
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
def test_an_ensemble_of_adapters_without_a_second_start_is_refused(lora, said, tokenizer, tmp_path):
    with pytest.raises(InputError, match=said):
        fit(make_model(**lora), LM_TASK, Ensemble(2), arguments(tmp_path), tokenizer=tokenizer)


def test_swag_serves_dora(tokenizer, tmp_path):
    model = make_model(use_dora=True)
    posterior = fit(model, LM_TASK, Swag(), arguments(tmp_path), tokenizer=tokenizer)
    assert any("magnitude" in name for name in posterior.mean)
    assert predict(model, posterior, LM_TASK.test, draws=2, tokenizer=tokenizer).draws == 2


def test_dropout_draws_of_an_adapter_without_dropout_are_refused(tokenizer, tmp_path):
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
def test_an_ensemble_without_meaning_is_refused(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_an_adapter_of_another_start_is_refused_before_it_is_written():
    model = make_model(use_dora=True)
    before = read(model)
    with pytest.raises(InputError, match="DoRA"):
        initialise(model, 0)
    assert same_params(read(model), before)


def test_the_adapters_dtype_does_not_matter_to_what_is_read():
    model = make_model()
    assert all(p.dtype == torch.float32 for p in read(model.half()).values())


def one(text="bag holds 1 red, 2 blue.", choices=("red", "blue"), **form):
    return Split("bags/test", (Example(text, choices, 0),), Format(**({"template": ""} | form)))


def test_a_split_without_examples_is_refused(asked):
    with pytest.raises(InputError, match="bags/test has no examples"):
        asked(make_model(), split=LM_TASK.test.take([]))


def test_a_choice_that_becomes_no_token_is_refused(tokenizer):
    strips = make_tokenizer()
    strips.backend_tokenizer.normalizer = normalizers.Strip(left=False, right=True)
    readout = readout_for(make_model(), one(readout="likelihood"), strips)
    with pytest.raises(InputError, match="row 0 of bags/test: the choice ' ' becomes no token"):
        readout.encode(one(choices=("red", ""), readout="likelihood"))


def test_a_choice_that_grows_together_with_the_prompt_is_refused():
    lines = make_tokenizer()
    lines.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[^\n]+|\n"), "isolated")
    lines.backend_tokenizer.model = models.WordLevel({"<unk>": 0, "Answer:": 1, "\n": 2}, unk_token="<unk>")
    split = one(readout="likelihood")
    with pytest.raises(InputError, match=r"row 0 of bags/test: .* become one token"):
        readout_for(make_model(), split, lines).encode(split)


def test_letters_that_are_no_tokens_of_their_own_are_refused(tokenizer):
    split = one(choices=tuple("123456789"), readout="letters")  # the vocabulary ends with G
    with pytest.raises(InputError, match="letters are not one token each"):
        readout_for(make_model(), split, tokenizer).encode(split)


LONG = "bag holds " + "1 red, " * 60 + "2 blue."


@pytest.mark.parametrize("readout", ["letters", "likelihood"])
def test_a_prompt_longer_than_the_model_is_refused_or_cut_and_counted(asked, readout):
    model = make_model()
    with pytest.raises(InputError, match=r"row 0 of bags/test has \d+ tokens, and the model reads at most"):
        asked(model, split=one(LONG, readout=readout))
    split = one(LONG, readout=readout, max_length=10_000)
    both = replace(split, examples=(*split.examples, *one().examples))
    assert asked(model, split=both).truncated == 1


def test_a_long_text_for_a_classification_head_is_refused_or_cut_and_counted(tokenizer):
    model = KINDS["bert"].build()
    point = Point(read(model), origin_of(model))
    split = Split("bags/test", (Example(LONG, ("a", "b", "c")),), Format("{text}"), ("a", "b", "c"))
    with pytest.raises(InputError, match="the model reads at most 128"):
        predict(model, point, split, tokenizer=tokenizer)
    cut = replace(split, format=Format("{text}", max_length=64))
    assert predict(model, point, cut, tokenizer=tokenizer).truncated == 1


def test_an_answer_longer_than_the_model_is_refused(asked):
    split = one(choices=("red", "dark " * 200 + "green"), readout="likelihood", max_length=64)
    with pytest.raises(InputError, match="row 0 of bags/test has a choice longer than the model's 128 tokens"):
        asked(make_model(), split=split)


def test_a_prompt_of_no_tokens_is_refused(asked):
    for split in (one("", template="{text}", readout="likelihood"), one(readout="likelihood", max_length=0)):
        with pytest.raises(InputError, match="row 0 of bags/test has a prompt without a token"):
            asked(make_model(), split=split)


def classes(count, readout="auto"):
    names = ("red", "blue", "green", "gold")[:count]
    return Split("bags/test", (Example("bag", names, 0),), Format("", readout, kind="class"), names)


def headless():
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
def test_a_readout_that_does_not_fit_the_model_is_refused(make, split, said, tokenizer):
    with pytest.raises(InputError, match=said):
        readout_for(make(), split, tokenizer)


def test_a_head_without_a_padding_token_is_refused():
    bare = make_tokenizer()
    bare.pad_token = None
    with pytest.raises(InputError, match="padding token"):
        readout_for(KINDS["bert"].build(), classes(3), bare)


def test_a_model_without_a_saved_tokenizer_is_asked_for_one():
    with pytest.raises(InputError, match="pass tokenizer="):
        readout_for(make_model(), one())


def test_less_than_no_draws_are_refused(asked, tokenizer):
    with pytest.raises(InputError, match="draws must be at least 0, which is the mean"):
        predict(make_model(), gaussian(make_model()), LM_TASK.test, draws=-1, tokenizer=tokenizer)
    assert gaussian(make_model()).count(1) == 1
