"""The command line teaches: help, examples that parse, and sentences about words that it does not know."""

import dataclasses
import re
import shlex
import subprocess
import sys
from importlib import import_module

import pytest

from bayeslora.cli import VERBS
from bayeslora.cli.parse import parse
from bayeslora.methods import METHODS
from bayeslora.version import __version__


def module(verb):
    return import_module(f"bayeslora.cli.{verb.replace('-', '_')}")


def test_the_help_of_method_names_every_method(bay):
    assert METHODS.keys() - set(re.findall(r"[\w-]+", bay("train", "--help").out)) == set()


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_verb_and_a_first_command(bay, words):
    said = bay(*words)
    assert said.status == 0
    assert all(verb in said.out for verb in VERBS)
    assert "bayeslora demo" in said.out


def test_version_is_the_packages(bay):
    assert bay("--version").out.strip() == __version__


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_every_option_with_its_meaning_and_examples(bay, verb):
    said = bay(verb, "--help")
    assert said.status == 0
    assert "examples:" in said.out
    for f in dataclasses.fields(module(verb).Options):
        assert f.metadata["help"].strip()
        assert f.name == "run" or f"--{f.name.replace('_', '-')}" in said.out
    assert "_" not in re.sub(r"(?s)examples:.*", "", "".join(re.findall(r"--\w[\w-]*", said.out)))


@pytest.mark.parametrize("verb", VERBS)
def test_examples_in_the_help_are_commands_that_parse(verb):
    text = module(verb).EXAMPLES.replace("\\\n", " ")
    commands = re.findall(r"bayeslora (\w[\w-]* ?[^\n|]*)", text.partition("\n\n")[0])
    assert commands
    for command in commands:
        words = shlex.split(re.split(r" {3,}", command)[0], comments=False)
        if "--config" in words:
            at = words.index("--config")
            del words[at : at + 2]
        assert parse(module(words[0]).Options, words[1:], verb=words[0], examples="") is not None


@pytest.mark.parametrize("verb", VERBS)
def test_every_default_is_within_its_limits(verb):
    options = module(verb).Options()
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float):
                assert f.metadata["least"] <= number <= f.metadata["most"], f.name


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from bayeslora.cli import main; main(['train', '--help']);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'peft', 'datasets')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_an_unknown_verb_is_answered_with_the_closest(refused):
    assert "did you mean evaluate?" in refused("evalute")


def test_an_unknown_option_is_answered_with_the_closest(bay):
    said = bay("train", "--learning-rat", "1")
    assert said.status == 2
    assert "--learning-rat," in said.err
    assert "--learning-rate" in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("words", [["--epochs", "many"], ["--dtype", "float16"], ["--epochs"]])
def test_a_flag_without_a_good_value_exits_with_status_2(bay, words):
    said = bay("train", *words)
    assert said.status == 2
    assert words[0] in said.err


@pytest.mark.parametrize(
    ("verb", "flag", "value"),
    [("train", "--draws", "-1"), ("train", "--rank", "0"), ("export", "--prune", "1.5"), ("compare", "--seeds", "-1"),
     ("train", "--learning-rate", "nan"), ("evaluate", "--temperature", "-1"), ("evaluate", "--bins", "0"),
     ("train", "--learning-rate", "inf"), ("compare", "--temperatures", "-1"), ("generate", "--beams", "0"),
     ("generate", "--top-p", "1.5"), ("distill", "--held-out", "2"),
     ("evaluate", "--ood-rows", "-1"), ("serve", "--most-waiting", "0")],
)  # fmt: skip
def test_a_number_without_a_meaning_is_refused_by_its_flag(refused, verb, flag, value):
    assert refused(verb, flag, value).startswith(f"bayeslora: {flag} ")


def test_flags_may_be_written_with_underscores():
    options = parse(module("train").Options, ["--learning_rate", "0.5"], verb="train", examples="")
    assert options.learning_rate == 0.5


def test_a_flag_has_its_former_spelling_too_which_help_does_not_show(bay, tmp_path):
    for words in (["--min-draws", "6"], ["--fewest-draws", "6"]):
        assert parse(module("predict").Options, ["run", *words], verb="predict", examples="").min_draws == 6
    (tmp_path / "run.yaml").write_text("run: somewhere\nfewest_draws: 6\n")
    words = ["--config", str(tmp_path / "run.yaml")]
    assert parse(module("predict").Options, words, verb="predict", examples="").min_draws == 6
    assert "fewest" not in bay("predict", "--help").out


def test_a_run_gives_its_options_also_where_yaml_names_it_and_what_is_typed_comes_first(tmp_path):
    (tmp_path / "run" / "posterior").mkdir(parents=True)
    (tmp_path / "run" / "options.json").write_text('{"draws": 7, "few_shot": 2, "task": "arc_easy", "seed": 3}')
    (tmp_path / "some.yaml").write_text(f"run: {tmp_path / 'run'}\nfew-shot: 1\nood: sst2\n")
    words = ["--config", str(tmp_path / "some.yaml"), "--task", "sst2"]
    options = parse(module("evaluate").Options, words, verb="evaluate", examples="")
    assert (options.draws, options.few_shot, options.task, options.ood) == (7, 1, "sst2", ["sst2"])


def test_words_of_yaml_are_taken_as_they_are_typed(tmp_path):
    (tmp_path / "run.yaml").write_text("classes: [yes, no, 010, 1.50, 2020-01-01]\nresume: yes\nalpha: .5\ndata: on\n")
    options = parse(module("train").Options, ["--config", str(tmp_path / "run.yaml")], verb="train", examples="")
    assert options.classes == ["yes", "no", "010", "1.50", "2020-01-01"]
    assert (options.resume, options.alpha, options.data) == (True, 0.5, "on")


def test_yaml_gives_values_and_flags_override_them(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning-rate: 2e-4\nrank: 4\nmethod: map\nchoice_columns: [a, 1]\ntrainer: {max_grad_norm: 0.5}\n"
        "set: {weight_decay: 0.1}\nalpha: 8\n"
    )
    words = ["--config", str(file), "--rank", "2"]
    options = parse(module("train").Options, words, verb="train", examples="")
    assert (options.learning_rate, options.rank, options.method, options.alpha) == (2e-4, 2, "map", 8)
    assert options.choice_columns == ["a", "1"]
    assert options.trainer == '{"max_grad_norm": 0.5}'
    assert options.set == ["weight_decay=0.1"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rat: 1", "unknown option 'learning_rat'; did you mean learning_rate"),
        ("rank: four", "rank must be a whole number, and it is 'four'"),
        ("rank: 4.5", "rank must be a whole number, and it is 4.5"),
        ("rank: true", "rank must be a whole number, and it is True"),
        ("resume: 1", "resume must be true or false"),
        ("readout: words", "readout must be one of auto, letters"),
        ("classes: {a: 1}", "classes must be a list, each text"),
        ("- rank", "must hold options and their values"),
        ("rank: [", "cannot be read"),
        ("task: null", "task must be text, and it is None"),
        ("classes: [a, null]", "classes must be a list, each text"),
        ("rank: 4\nalpha: 8\nrank: 8", "line 3 gives 'rank' a second time"),
        ("train-rows: 4\ntrain_rows: 8", "gives train_rows a second time"),
        ("set: {kl: 1, kl: 2}", "gives 'kl' a second time"),
    ],
)
def test_yaml_that_does_not_fit_is_refused_and_the_file_named(refused, tmp_path, text, expected):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    said = refused("train", "--config", file)
    assert expected in said
    assert "run.yaml" in said


def test_a_missing_yaml_file_is_refused(refused, tmp_path):
    assert "There is no file" in refused("train", "--config", tmp_path / "none.yaml")
