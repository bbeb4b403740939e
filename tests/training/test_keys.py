"""Every field of what goes into a comparison changes a key, or is known, with the reason, not to matter."""

import copy
import inspect
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
from support.tiny import arguments, make_model, make_task, make_tokenizer
from tokenizers import normalizers
from transformers import TrainerCallback, TrainingArguments

from bayeslora.comparison.cached_runs import CachedRuns, Learned, planned, prediction_inputs
from bayeslora.comparison.costs import Cost
from bayeslora.methods import METHODS, Map, PostHoc, Swag
from bayeslora.methods.base import LATER
from bayeslora.posteriors import Draws
from bayeslora.prediction import PassOptions, predict
from bayeslora.tasks.types import Example, Format, Split, Task
from bayeslora.training import keys
from bayeslora.training.keys import key_of, of_arguments, of_method, of_model, of_rows, of_tokenizer
from bayeslora.training.run import fit


def cached():
    task = make_task(readout="likelihood")
    return CachedRuns(make_model(lora_dropout=0.1), make_tokenizer(), task, arguments("training"), Path("out"))


def run_key(runs, method=None):
    return planned(runs, method or Map(), 0).key


def prediction_key(runs):
    assert runs.task.test is not None
    return key_of({"posterior": run_key(runs), **prediction_inputs(runs, runs.task.test, 0)})


def fewer(split):
    assert split is not None
    return split.take(range(len(split) - 1))


def other_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


OTHER = make_task(readout="likelihood")
RUNS = {
    "model": (make_model(r=4, lora_dropout=0.1), "a run"),
    "tokenizer": (other_tokenizer(), "a run"),
    "task": (replace(OTHER, train=fewer(OTHER.train)), "a run"),
    "args": (arguments("training", learning_rate=0.7), "a run"),
    "swag_share": (1.0, "a run of SWAG"),
    "draws": (Draws(10, sampling="antithetic"), "a prediction"),
    "out": (Path("elsewhere"), "nothing: the place of the files"),
    "ood": ({"other": OTHER.train}, "nothing: the prediction of each set has the digest of its rows"),
    "temperatures": ((0.1,), "nothing: what is tempered has the key of its temperature"),
    "scaling": (True, "nothing: it is fitted again to predictions that are kept"),
    "scaling_without_labels": (True, "nothing: as scaling"),
    "divergence": (0.1, "nothing: what is scaled has the key of its scale"),
    "token_budget": (64, "nothing: the same up to rounding"),
    "resamples": (7, "nothing: evaluated again"),
    "bins": (7, "nothing: evaluated again"),
    "report": (str, "nothing: it is only called"),
    "callbacks": ((TrainerCallback(),), "nothing: they are to change nothing that is learned"),
}


def test_every_field_of_cached_runs_changes_a_key_or_has_a_reason_not_to():
    assert RUNS.keys() == {f.name for f in fields(CachedRuns)}


@pytest.mark.parametrize("name", RUNS)
def test_a_changed_field_changes_the_key_of_what_depends_on_it(name):
    value, changes = RUNS[name]
    one, other = cached(), replace(cached(), **{name: value})
    method = Swag() if changes == "a run of SWAG" else Map()
    assert (run_key(one, method) != run_key(other, method)) == changes.startswith("a run")
    assert (prediction_key(one) != prediction_key(other)) == (changes in ("a run", "a prediction"))


def test_the_seed_and_the_member_are_in_the_key():
    runs, test = cached(), OTHER.test
    assert test is not None
    assert len({planned(runs, Map(), seed, member).key for seed in (0, 1) for member in (0, 1)}) == 4
    assert prediction_inputs(runs, test, 0) != prediction_inputs(runs, test, 1)


def test_what_is_tempered_has_a_key_of_its_own():
    one = Learned(object(), Cost(0.0, None, None, 0), "key")
    assert len({one.key, one.keyed(1.0).key, one.keyed(0.1).key}) == 3


TASKS = {
    "name": (replace(OTHER, name="elsewhere"), "nothing: a name"),
    "train": (replace(OTHER, train=fewer(OTHER.train)), "a run"),
    "validation": (replace(OTHER, validation=fewer(OTHER.validation)), "a run"),
    "test": (replace(OTHER, test=fewer(OTHER.test)), "a prediction"),
}


def test_every_split_of_a_task_is_in_a_key():
    assert TASKS.keys() == {f.name for f in fields(Task)}
    for task, changes in TASKS.values():
        one, other = cached(), replace(cached(), task=task)
        assert (run_key(one) != run_key(other)) == (changes == "a run")
        assert (prediction_key(one) != prediction_key(other)) == (not changes.startswith("nothing"))


EXAMPLE = Example("Is it wet?", ("no", "yes"), 1, None, (("premise", "It rains."),))
FORMAT = Format("{text}", "likelihood")
ROWS = {
    "Example": {
        "text": "Is it dry?",
        "choices": ("yes", "no"),
        "label": 0,
        "columns": (("premise", "It snows."),),
        "probs": (0.5, 0.5),
    },
    "Format": {
        "template": "{text} ",
        "readout": "letters",
        "few_shot": (EXAMPLE,),
        "max_length": 9,
        "kind": "class",
        "normalisation": "tokens",
    },
    "Split": {"name": "elsewhere", "examples": (EXAMPLE, EXAMPLE), "format": FORMAT, "classes": ("no", "yes")},
}
IDLE_OF_ROWS = {
    ("Example", "probs"): "the truth is only compared with",
    ("Split", "name"): "a name",
    ("Split", "format"): "here the same; its fields are looked at one by one",
}


def test_every_field_of_a_row_and_of_its_format_is_in_the_digest_or_has_a_reason_not_to():
    split = Split("t", (EXAMPLE,), FORMAT)
    for value, place in ((EXAMPLE, "examples"), (FORMAT, "format"), (split, "")):
        kind = type(value).__name__
        assert ROWS[kind].keys() == {f.name for f in fields(value)}
        for name, other in ROWS[kind].items():
            changed = replace(value, **{name: other})
            whole = changed if not place else replace(split, **{place: (changed,) if place == "examples" else changed})
            assert isinstance(whole, Split)
            assert (of_rows(whole) != of_rows(split)) == ((kind, name) not in IDLE_OF_ROWS), name


def test_every_field_of_draws_is_in_the_key_of_a_prediction_but_for_the_seed_which_is_the_runs():
    changes = {"count": 3, "seed": 9, "sampling": "sobol", "tolerance": 0.1, "minimum": 7}
    assert changes.keys() == {f.name for f in fields(Draws)}
    runs, test = cached(), OTHER.test
    assert test is not None
    for name, value in changes.items():
        other = replace(runs, draws=replace(Draws(), **{name: value}))
        assert (prediction_inputs(other, test, 0) != prediction_inputs(runs, test, 0)) == (name != "seed")


def test_every_argument_of_the_trainer_is_in_the_key_or_is_named_among_those_that_do_not_matter():
    plain = arguments("training")
    for field in fields(TrainingArguments):
        if not field.init or field.name == "output_dir":
            continue
        other = copy.copy(plain)
        parallel = type("Parallel", (), {"to_json": lambda self: 77})()
        setattr(other, field.name, parallel if field.name == "parallelism_config" else 77)
        if field.name == "load_best_model_at_end":
            continue  # then the arguments that choose the best state are in the key too
        named = field.name in keys.IDLE_ARGUMENTS
        named = named or field.name.startswith((*keys.IDLE_BEGINNINGS, *keys.CHOOSING))
        assert (of_arguments(other) != of_arguments(plain)) == (not named), field.name
    assert {*keys.IDLE_ARGUMENTS} <= {f.name for f in fields(TrainingArguments)} | {"local_rank"}


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_method_is_in_the_key(name):
    method = METHODS[name]()
    later = {f.name for f in fields(method) if f.metadata == LATER}
    assert of_method(method).keys() == {"name"} | {f.name for f in fields(method)} - later
    for field in later:  # left out at its default alone, so that what was made before it serves
        other = copy.copy(method)
        object.__setattr__(other, field, "other")
        assert of_method(other).keys() == of_method(method).keys() | {field}


@dataclass(frozen=True)
class Mine(Map):
    """A method of one's own under a name that is taken."""


def test_a_method_of_ones_own_is_not_taken_for_ours():
    assert key_of(of_method(Mine())) != key_of(of_method(Map()))


MODELS = {
    "a weight that quantisation would change": lambda m: next(
        p for n, p in m.named_parameters() if n.endswith("v_proj.base_layer.weight") or "mlp" in n
    ).data.mul_(1.01),
    "the input embedding": lambda m: m.get_input_embeddings().weight.data.mul_(1.01),
    "the base's configuration": lambda m: setattr(m.get_base_model().config, "attention_dropout", 0.5),
    "what is trainable": lambda m: next(p for n, p in m.named_parameters() if "lora_A" in n).requires_grad_(False),
    "the adapter's configuration": lambda m: setattr(m.peft_config["default"], "lora_alpha", 77),
    "the base's dtype": lambda m: m.bfloat16(),
}
IDLE_OF_MODELS = {
    "the adapter's weights, which are drawn anew": lambda m: [
        p.data.add_(1) for n, p in m.named_parameters() if "lora_" in n
    ],
    "the place of the base": lambda m: setattr(m.peft_config["default"], "base_model_name_or_path", "/elsewhere"),
    "the mode, which is set": lambda m: m.eval(),
    "what a Trainer sets": lambda m: setattr(m.get_base_model().config, "use_cache", False),
}


@pytest.mark.parametrize("what", [*MODELS, *IDLE_OF_MODELS])
def test_of_a_model_all_but_its_place_and_the_adapters_present_weights_counts(what):
    model, same = make_model(), make_model()
    assert of_model(model) == of_model(same)
    (MODELS | IDLE_OF_MODELS)[what](model)
    assert (of_model(model) != of_model(same)) == (what in MODELS)


def test_a_new_head_is_drawn_anew_and_no_part_of_the_key():
    model, other = make_model("bert"), make_model("bert")
    for name, p in model.named_parameters():
        if "classifier" in name:
            p.data.add_(1)
    assert of_model(model) == of_model(other)


def test_how_a_tokenizer_was_used_is_no_part_of_the_key_and_what_it_makes_of_texts_is():
    tokenizer, same = make_tokenizer(), make_tokenizer()
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=2)
    assert of_tokenizer(tokenizer) == of_tokenizer(same)
    assert of_tokenizer(other_tokenizer()) != of_tokenizer(same)
    same.add_tokens(["green bag"])
    assert of_tokenizer(tokenizer) != of_tokenizer(same)
    tokenizer.eos_token = "G"
    assert of_tokenizer(tokenizer) != of_tokenizer(make_tokenizer())


PARAMETERS = {
    # model, posterior and split are in the key; with a mean always; the base, which all methods share, has files of its
    # own; the rest are the same up to rounding
    predict: {"model", "posterior", "split", "draws", "mean", "base", "tokenizer", "token_budget", "options"},
    # callbacks change nothing that is learned; a run goes on from its own folder
    fit: {"model", "task", "method", "args", "tokenizer", "start", "resume", "callbacks"},
    PostHoc.fit: {"self", "model", "task", "start", "tokenizer", "seed", "token_budget", "progress"},
    PassOptions: {"stack", "share_prefix", "compile", "progress"},
}


@pytest.mark.parametrize("function", PARAMETERS, ids=lambda f: f.__qualname__)
def test_whoever_adds_a_parameter_has_to_say_whether_it_belongs_in_the_key(function):
    assert set(inspect.signature(function).parameters) == PARAMETERS[function]
