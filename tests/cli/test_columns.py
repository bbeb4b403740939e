"""Data with several columns, and normalised scores, from training to what a run then serves."""

import json
from dataclasses import replace

import pytest
from support.cli_data import POINTS, QUICK, write_rows
from support.folders import change, first_format

from bayeslora.cli.data import format_from_options, saved_format, scored_as, split_like, unescaped
from bayeslora.cli.options import TaskOptions
from bayeslora.cli.parse import parse
from bayeslora.cli.predict import EXAMPLES, Options
from bayeslora.errors import InputError
from bayeslora.posteriors.loading import load_posterior
from bayeslora.posteriors.provenance import Origin, check_scores
from bayeslora.tasks import read_rows, render, resolve_format

TEMPLATE = r"{premise}\nQuestion: {hypothesis}\nAnswer:"


def nli_rows(count, *, labels=True):
    rows = [{"id": i, "premise": f"bag holds {i} red.", "hypothesis": f"holds {i % 3} blue."} for i in range(count)]
    return [row | {"label": ("green", "blue", "red")[i % 3]} for i, row in enumerate(rows)] if labels else rows


@pytest.fixture(scope="module")
def nli_run(home, tmp_path_factory):
    from bayeslora.cli import main

    path = tmp_path_factory.mktemp("nli")
    for name, count in (("train", 14), ("test", 6)):
        write_rows(path / "nli" / f"{name}.jsonl", nli_rows(count))
    words = ["--data", str(path / "nli"), "--readout", "likelihood", "--template", TEMPLATE, "--few-shot", "1"]
    words += ["--normalisation", "characters", "--draws", "2", "--out", str(path / "run")]
    assert main(["train", *home.model(), *words, *QUICK, *POINTS]) == 0
    return path / "run"


def options_of(run):
    found = parse(Options, [str(run)], verb="predict", examples=EXAMPLES)
    return TaskOptions(**{key: getattr(found, key) for key in TaskOptions.__dataclass_fields__})


def test_a_backslash_and_n_in_a_typed_template_are_a_new_line():
    assert unescaped(r"{a}\nQ: {b}") == "{a}\nQ: {b}"
    assert unescaped("{a}\nQ") == "{a}\nQ"
    assert unescaped(r"{a}\\n") == r"{a}\n"
    assert unescaped(r"{a}\times") == r"{a}\times"


def test_a_run_keeps_columns_and_normalisation_and_predicts_from_rows_without_labels(bay, nli_run, tmp_path):
    rows = write_rows(tmp_path / "new.jsonl", nli_rows(4, labels=False))
    said = bay("predict", nli_run, "--input", rows)
    assert said.status == 0, said.err
    assert [json.loads(line)["id"] for line in said.out.splitlines()] == [0, 1, 2, 3]
    like = saved_format(nli_run, options_of(nli_run))
    split = split_like(read_rows(rows), like, options_of(nli_run))
    prompt = render(split.examples[1], resolve_format(split, "likelihood"))
    assert prompt.endswith("\n\nbag holds 1 red.\nQuestion: holds 1 blue.\nAnswer:")
    assert split.format.normalisation == "characters"
    assert split.format.few_shot[0].columns[0][1].startswith("bag holds")
    said = bay("evaluate", nli_run, *POINTS)
    assert said.status == 0, said.err


def test_rows_that_lack_a_column_of_the_template_are_refused_with_theirs(refused, nli_run, tmp_path):
    rows = write_rows(tmp_path / "new.jsonl", [{"premise": "x", "other": "y"}])
    said = refused("predict", nli_run, "--input", rows)
    assert "line 1 has no column 'hypothesis', which the template names: its columns are premise, other" in said


def test_the_posterior_says_its_normalisation_and_another_is_refused(refused, nli_run, tmp_path):
    origin = load_posterior(nli_run / "posterior").origin
    assert origin.normalisation == "characters"
    rows = write_rows(tmp_path / "new.jsonl", nli_rows(2, labels=False))
    said = refused("predict", nli_run, "--input", rows, "--normalisation", "tokens")
    assert "trained with --normalisation characters, not tokens" in said
    with pytest.raises(InputError, match="load the task with normalisation='characters'"):
        check_scores(origin, "sum", "rows")
    check_scores(origin, None, "letters")
    check_scores(replace(origin, normalisation=None), "sum", "rows")
    assert Origin({}, "", {}).normalisation is None


def test_files_of_earlier_versions_mean_sums(swag_run, tmp_path):
    assert load_posterior(swag_run / "posterior").origin.normalisation == "tokens"
    task = json.loads((swag_run / "task.json").read_text())
    del task["format"]["normalisation"]
    write_rows(tmp_path / "task.json", [task])
    assert saved_format(tmp_path, TaskOptions()).format.normalisation == "sum"
    copy = tmp_path / "posterior"
    copy.mkdir()
    for file in (swag_run / "posterior").iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    first_format(copy)
    change(copy / "posterior_config.json", normalisation=None)
    origin = load_posterior(copy).origin
    assert origin.normalisation == "sum"
    assert scored_as(TaskOptions(), origin).normalisation == "sum"
    assert format_from_options(TaskOptions(readout="likelihood"), "rows", origin).format.normalisation == "sum"
    assert format_from_options(TaskOptions(readout="likelihood"), "rows", None).format.normalisation == "tokens"
