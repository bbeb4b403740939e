"""``train`` and what its folder then serves: ``evaluate``, ``predict`` and ``export``."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.cli_data import POINTS, QUICK, class_rows, question_rows, write_rows
from support.tiny import make_base

from bayeslora.cli.data import saved_format, split_like
from bayeslora.cli.options import TaskOptions
from bayeslora.cli.terminal import NOISY
from bayeslora.posteriors.loading import load_posterior
from bayeslora.tasks import read_rows


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_holds_posterior_options_format_and_metrics_and_nothing_else(swag_run):
    assert sorted(p.name for p in swag_run.iterdir()) == ["evaluation.json", "options.json", "posterior", "task.json"]
    options = json.loads((swag_run / "options.json").read_text())
    assert (options["method"], options["max_steps"], options["draws"]) == ("swag", 8, 3)
    evaluation = json.loads((swag_run / "evaluation.json").read_text())
    assert (evaluation["n"], evaluation["draws"]) == (13, 3)


def test_evaluate_takes_model_data_and_draws_from_the_run_and_gives_the_same_numbers(bay, swag_run):
    before = json.loads((swag_run / "evaluation.json").read_text())
    said = bay("evaluate", swag_run, *POINTS)
    assert said.status == 0, said.err
    assert "13 examples, 3 draws" in said.out
    assert json.loads((swag_run / "evaluation.json").read_text()) == before


def test_evaluate_shapes_the_posterior_and_tells_other_data(bay, swag_run, home, tmp_path):
    cold, other = tmp_path / "cold.json", home.path / "other.jsonl"
    words = ["--draws", "2", "--resamples", "0", "--json", cold]
    said = bay("evaluate", swag_run, *words, "--temperature", "0", "--ood", other)
    assert said.status == 0, said.err
    rows = json.loads(cold.read_text())["rows"]
    assert rows["draws"]["nll"]["value"] == pytest.approx(rows["mean"]["nll"]["value"], abs=1e-6)
    assert "other/auroc_mutual_information" in rows["draws"]
    assert "other: 9 examples" in said.out
    said = bay("evaluate", swag_run, *words, "--overwrite", "--prune", "1", "--last-layers", "1")
    assert said.status == 0, said.err
    assert json.loads(cold.read_text())["rows"]["draws"]["nll"]["value"] != rows["draws"]["nll"]["value"]
    found = []
    for noise in ("all", "answer"):
        said = bay("evaluate", swag_run, *words, "--overwrite", "--noise", noise)
        assert said.status == 0, said.err
        found.append(json.loads(cold.read_text())["rows"])
    assert found[0]["mean"]["nll"]["value"] == pytest.approx(found[1]["mean"]["nll"]["value"], abs=1e-5)
    assert found[0]["draws"]["nll"]["value"] != pytest.approx(found[1]["draws"]["nll"]["value"], abs=1e-6)
    said = bay("export", swag_run, "--noise", "answer", "--out", tmp_path / "adapters")
    assert said.status == 2
    assert "is no adapter" in said.err


def test_a_given_flag_wins_over_the_runs_even_at_its_default(bay, swag_run):
    assert "10 draws" in bay("evaluate", swag_run, "--draws", "10", "--resamples", "0").out
    assert bay("evaluate", swag_run, "--resamples", "0").status == 0


def test_a_posterior_without_its_run_says_itself_what_its_adapter_is(bay, swag_run, home, tmp_path):
    alone = shutil.copytree(swag_run / "posterior", tmp_path / "alone")
    rows = write_rows(tmp_path / "new.jsonl", question_rows("new", 3, 5))
    words = ["--readout", "likelihood", "--dtype", "float32", "--draws", "3"]
    said = bay("predict", alone, "--input", rows, *words)
    assert said.status == 0, said.err
    assert lines(said.out) == lines(bay("predict", swag_run, "--input", rows).out)


def test_predict_returns_each_row_with_its_answer_and_needs_no_training_data(bay, swag_run, tmp_path, monkeypatch):
    moved = shutil.copytree(swag_run, tmp_path / "moved")
    options = json.loads((moved / "options.json").read_text())
    (moved / "options.json").write_text(json.dumps(options | {"data": str(tmp_path / "gone")}))
    rows = question_rows("new", 5, 5)
    path = write_rows(tmp_path / "new.jsonl", rows)
    said = bay("predict", moved, "--input", path)
    assert said.status == 0, said.err
    answers = lines(said.out)
    for row, answer in zip(rows, answers, strict=True):
        assert {key: answer[key] for key in row} == row
        assert list(answer["probs"]) == row["choices"]
        assert sum(answer["probs"].values()) == pytest.approx(1, abs=1e-5)
        assert answer["answer"] == max(answer["probs"], key=answer["probs"].get)
        assert answer["confidence"] == pytest.approx(max(answer["probs"].values()))
        assert {"entropy", "mutual_information", "disagreement", "draws", "monte_carlo_error"} <= answer.keys()
    monkeypatch.setattr(sys, "stdin", io.StringIO(path.read_text()))
    assert lines(bay("predict", moved).out) == answers


def test_predict_takes_as_many_draws_as_the_stated_error_needs(bay, swag_run, tmp_path):
    path = write_rows(tmp_path / "new.jsonl", question_rows("new", 8, 5))
    words = ["--draws", "40", "--sampling", "antithetic", "--min-draws", "4"]
    exact = lines(bay("predict", swag_run, "--input", path, *words).out)
    assert {row["draws"] for row in exact} == {40}
    enough = sorted(row["monte_carlo_error"] for row in exact)[4] * 2
    said = bay("predict", swag_run, "--input", path, *words, "--tolerance", f"{enough:.6f}")
    assert said.status == 0, said.err
    answers = lines(said.out)
    assert min(row["draws"] for row in answers) < 40
    assert all(row["monte_carlo_error"] <= enough + 1e-6 or row["draws"] == 40 for row in answers)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tolerance", "-1"], "tolerance"),
        (["--fewest-draws", "1"], "min-draws"),
        (["--sampling", "latin"], "antithetic"),
    ],
)
def test_numbers_of_draws_that_make_no_sense_are_refused(bay, swag_run, tmp_path, words, told):
    path = write_rows(tmp_path / "new.jsonl", question_rows("new", 2, 5))
    said = bay("predict", swag_run, "--input", path, *words)
    assert said.status != 0
    assert told in said.err
    assert "Traceback" not in said.err


def test_predict_writes_csv_and_does_not_touch_a_field_of_the_rows_own(bay, bert_run, tmp_path):
    rows = [{"description": row["description"], "answer": "mine"} for row in class_rows("new", 4, 5)]
    source, target = write_rows(tmp_path / "new.csv", rows), tmp_path / "answers.csv"
    said = bay("predict", bert_run, "--input", source, "--output", target)
    assert said.status == 0, said.err
    assert "predicted_answer" in said.err
    with target.open(newline="") as file:
        answers = list(csv.DictReader(file))
    assert [row["answer"] for row in answers] == ["mine"] * 4
    for row in answers:
        probs = json.loads(row["probs"])
        assert set(probs) == {"red", "blue", "green"}
        assert row["predicted_answer"] == max(probs, key=probs.get)
    assert not list(tmp_path.glob("*.partial"))


def test_evaluate_counts_labels_in_the_classes_that_were_trained_on(bay, bert_run, home, tmp_path):
    rows = [row for row in class_rows("test", 13, 2) if row["colour"] != "red"]
    two = write_rows(tmp_path / "two.csv", rows)
    said = bay("evaluate", bert_run, "--data", two, "--json", tmp_path / "two.json", "--resamples", "0")
    assert said.status == 0, said.err
    answers = lines(bay("predict", bert_run, "--input", two).out)
    right = sum(a["answer"] == a["colour"] for a in answers) / len(rows)
    accuracy = json.loads((tmp_path / "two.json").read_text())["rows"]["draws"]["accuracy"]["value"]
    assert accuracy == pytest.approx(right)


def test_evaluate_of_a_classifier_needs_no_labels_in_other_data(bay, bert_run, home, tmp_path):
    other = write_rows(tmp_path / "other.csv", [{"description": "old pale dark gold."}] * 3)
    said = bay("evaluate", bert_run, "--ood", other, "--resamples", "0", "--json", tmp_path / "x.json")
    assert said.status == 0, said.err
    assert "other: 3 examples" in said.out


def test_a_single_file_is_trained_on_and_is_not_taken_for_test_data(bay, refused, home, tmp_path):
    rows = class_rows("train", 20, 0)
    file = write_rows(tmp_path / "rows.csv", rows)
    words = ["--data", file, "--text-column", "description", "--label-column", "colour", "--method", "map"]
    said = bay("train", *home.model("llama"), *words, *QUICK, "--few-shot", "1", "--out", tmp_path / "run")
    assert said.status == 0, said.err
    assert "was trained on all of" in refused("evaluate", tmp_path / "run")
    said = bay("predict", tmp_path / "run", "--input", file)
    assert said.status == 0, said.err
    assert all(set(answer["probs"]) == {"red", "blue", "green"} for answer in lines(said.out))
    said = bay("evaluate", tmp_path / "run", "--data", write_rows(tmp_path / "test.csv", rows[:9]), "--resamples", "0")
    assert said.status == 0, said.err
    assert "9 examples" in said.out


def test_choices_in_columns_of_their_own_and_passages_before_yes_no_questions(bay, home, tmp_path):
    rows = [{"asked": "bag holds 1 red.", "a": "red", "b": "blue", "truth": "A"}] * 6
    data = write_rows(tmp_path / "own" / "train.jsonl", rows).parent
    words = ["--data", data, "--text-column", "asked", "--choice-columns", "a", "b", "--label-column", "truth"]
    said = bay("train", *home.model(), *words, *QUICK, "--method", "map", "--out", tmp_path / "own-run")
    assert said.status == 0, said.err
    new = write_rows(tmp_path / "new.csv", [{"asked": "bag holds 2 blue.", "a": "gold", "b": "blue"}])
    assert list(lines(bay("predict", tmp_path / "own-run", "--input", new).out)[0]["probs"]) == ["gold", "blue"]
    rows = [{"passage": "bag holds 1 red.", "question": "red", "answer": bool(i % 2)} for i in range(8)]
    write_rows(tmp_path / "boolq" / "train.jsonl", rows)
    words = ["--task", "boolq", "--data", tmp_path, "--method", "map", "--out", tmp_path / "boolq-run"]
    said = bay("train", *home.model(), *words, *QUICK)
    assert said.status == 0, said.err
    path = write_rows(tmp_path / "asked.jsonl", [{"passage": "bag holds 9 red.", "question": "red"}])
    assert list(lines(bay("predict", tmp_path / "boolq-run", "--input", path).out)[0]["probs"]) == ["no", "yes"]
    options = TaskOptions(task="boolq")
    like = saved_format(tmp_path / "boolq-run", options)
    assert split_like(read_rows(path), like, options).examples[0].text == "bag holds 9 red.\nred"


def test_exported_draws_and_the_mean_are_plain_adapters(bay, swag_run, tmp_path):
    said = bay("export", swag_run, "--draws", "3", "--out", tmp_path / "draws")
    assert said.status == 0, said.err
    folders = said.out.split()
    assert len(folders) == 3
    posterior = load_posterior(swag_run / "posterior")
    for k, folder in enumerate(folders):
        PeftModel.from_pretrained(make_base("llama"), folder)
        written = load_file(f"{folder}/adapter_model.safetensors")
        assert all(torch.equal(written[name], value) for name, value in posterior.draw(k).items())
    assert bay("export", swag_run, "--mean", "--out", tmp_path / "mean").status == 0
    PeftModel.from_pretrained(make_base("llama"), tmp_path / "mean")
    written = load_file(tmp_path / "mean" / "adapter_model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in posterior.mean.items())


@pytest.mark.slow
def test_progress_goes_to_standard_error_and_libraries_are_silent(home, tmp_path):
    words = [*home.marbles(), *QUICK, *POINTS, "--method", "map", "--out", str(tmp_path / "run")]
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRANSFORMERS_")}
    done = subprocess.run(
        [sys.executable, "-m", "bayeslora", "train", *words], capture_output=True, text=True, timeout=120, env=env
    )
    assert done.returncode == 0, done.stderr
    assert "{" not in done.stdout + done.stderr
    assert all(line.startswith(("map on marbles: 18 training rows", "  step ")) for line in done.stderr.splitlines())
    assert "s left" in done.stderr
    assert "evaluate" in done.stdout.splitlines()[-1]
    assert not any(name in done.stderr for name in NOISY)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_from_which_resume_gives_the_uninterrupted_posterior(
    number, bay, swag_run, home, tmp_path, monkeypatch
):
    from bayeslora.cli import progress

    out, before = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    step = progress.Progress.on_step_end

    def press(self, args, state, control, **kwargs):
        step(self, args, state, control, **kwargs)
        if state.global_step == 6:
            os.kill(os.getpid(), number)

    words = ["train", *home.marbles(), *QUICK, *POINTS, "--draws", "3", "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(progress.Progress, "on_step_end", press)
        said = bay(*words)
    assert said.status == 128 + number
    assert "--resume goes on" in said.err
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (out / "posterior").exists()
    assert bay("evaluate", out).status == 2  # there is nothing to evaluate yet
    assert bay(*words).status == 2  # and nothing is overwritten
    said = bay(*words, "--resume")
    assert said.status == 0, said.err
    for name in ("posterior.safetensors", "adapter_model.safetensors"):
        one, other = load_file(out / "posterior" / name), load_file(swag_run / "posterior" / name)
        assert all(torch.equal(one[key], other[key]) for key in other)
    assert not (out / "training").exists()


def test_resume_of_a_finished_run_trains_nothing_and_keeps_its_options(bay, refused, swag_run, home, monkeypatch):
    import transformers

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(transformers.Trainer, "train", never)
    words = ["train", *home.marbles(), *QUICK, *POINTS, "--draws", "3", "--out", swag_run]
    assert "--resume" in refused(*words)
    assert "is trained already" in bay(*words, "--resume").out
    assert "begun with rank=8, and now it is 4" in refused(*words, "--rank", "4", "--resume")


def test_a_member_that_is_trained_alone_is_that_of_the_ensemble(bay, home, tmp_path):
    words = [*home.bags(), *QUICK, *POINTS, "--seed", "4", "--resamples", "0"]
    said = bay("train", *words, "--method", "ensemble:2", "--out", tmp_path / "all")
    assert said.status == 0, said.err
    whole = load_posterior(tmp_path / "all" / "posterior")
    for k in range(2):
        said = bay("train", *words, "--method", "map", "--member", k, "--out", tmp_path / f"{k}")
        assert said.status == 0, said.err
        alone = load_posterior(tmp_path / f"{k}" / "posterior")
        assert all(torch.equal(alone.mean[name], value) for name, value in whole.members[k].mean.items())


def test_a_member_of_all_members_is_refused(refused, home, tmp_path):
    words = [*home.bags(), *QUICK, "--method", "ensemble:2", "--member", "1", "--out", tmp_path / "run"]
    assert "--method map" in refused("train", *words)


def test_a_run_of_a_version_without_an_option_is_gone_on_with(bay, bert_run, home, tmp_path):
    old = shutil.copytree(bert_run, tmp_path / "old")
    options = json.loads((old / "options.json").read_text())
    del options["member"]
    (old / "options.json").write_text(json.dumps(options))
    words = [*home.bags(), *QUICK, *POINTS, "--method", "ensemble:2", "--out", old, "--resume"]
    said = bay("train", *words)
    assert said.status == 0, said.err
    assert "is trained already" in said.out
