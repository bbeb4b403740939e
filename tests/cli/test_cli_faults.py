"""What cannot be used is refused in one sentence, with status 2, and leaves nothing behind."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from support.cli_data import POINTS, QUICK, question_rows, write_rows

from bayeslora import files
from bayeslora.cli import main
from bayeslora.cli.data import saved_format
from bayeslora.cli.options import TaskOptions
from bayeslora.cli.settings import build_method
from bayeslora.errors import InputError
from bayeslora.methods import Map, Swag


@pytest.fixture
def train(refused, home, tmp_path):
    """Ask for a training that is to be refused, and see that no folder is made."""

    def run(*words):
        said = refused("train", *home.marbles(), *QUICK, "--out", tmp_path / "run", *words)
        assert not (tmp_path / "run").exists()
        assert not list(tmp_path.glob(".run*"))
        return said

    return run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data", "nowhere"], "There is no file or folder nowhere"),
        (["--text-column", "title", "--choice-columns", "choices"], "no column 'title'"),
        (["--method", "swagg"], "unknown method 'swagg', did you mean swag"),
        (["--method", "ensemble:many"], "after the colon comes the number"),
        (["--set", "start"], "write key=value"),
        (["--set", "begin=3"], "swag has no setting 'begin'"),
        (["--set", "start=abc"], "swag's setting start must be a whole number or a number, and it is 'abc'"),
        (["--set", "rank=2.5"], "swag's setting rank must be a whole number, and it is 2.5"),
        (["--set", "scale=NaN"], "swag's setting scale must be a number or divergence or null"),
        (["--set", "start=1.5"], "start must be a step or a share"),
        (["--set", "interval=100"], "collects 0 snapshots"),
        (["--method", "map", "--set", "early_stopping=-1"], "early_stopping must be at least 1"),
        (["--trainer", '{"nonsense": 1}'], "names 'nonsense'"),
        (["--trainer", '{"max_grad_nrm": 1}'], "did you mean max_grad_norm?"),
        (["--trainer", "[1]"], "must be a JSON object"),
        (["--trainer", "{1}"], "is not JSON"),
        (["--scheduler", "round"], "the Trainer does not take these arguments: round is not a valid"),
        (["--few-shot", "100"], "leave none to train on"),
        (["--template", "no place"], "has no {text}"),
        (["--target-modules", "nothing"], "does not fit"),
        (["--few-shot", "8"], "set max_length"),
        (["--model", ""], "name a base model"),
    ],
)
def test_a_training_that_cannot_be_is_refused(train, words, expected):
    assert expected in train(*words)


def test_an_unknown_model_folder_is_refused(train, tmp_path):
    assert "cannot be loaded" in train("--model", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in train("--model", tmp_path / "empty")


def test_cut_model_weights_are_refused(train, home, tmp_path):
    broken = shutil.copytree(home.path / "llama", tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in train("--model", broken)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"question": "red", "choices": ["a", "b"], "label": 5}\n', "line 1: the label '5' is out of range"),
        ('{"question": "red", "choices": ["a", "b"], "label": 0}\n{"question"\n', "line 2 is not valid JSON"),
        ('{"question": "red", "choices": ["a", "b"]}\n', "no column 'label'"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused_by_their_line(train, tmp_path, text, expected):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(text)
    said = train("--data", tmp_path / "data")
    assert expected in said
    assert "train.jsonl" in said


def test_without_task_and_data_the_two_are_asked_for(refused, home, tmp_path):
    assert "name a task" in refused("train", *home.model(), "--out", tmp_path / "run")
    said = refused("train", *home.model(), "--task", "openbokqa", "--out", tmp_path / "run")
    assert "did you mean openbookqa" in said


def test_a_full_disk_while_the_posterior_is_written_is_one_sentence(bay, home, tmp_path, monkeypatch):
    from bayeslora.posteriors import folder as storage

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    out = tmp_path / "run"
    said = bay("train", *home.marbles(), *QUICK, "--method", "map", "--out", out)
    assert said.status == 2
    assert "No space left on device" in said.err.splitlines()[-1]
    assert "Traceback" not in said.err
    assert not out.exists()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_folder_that_cannot_be_made_is_refused(refused, home, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    said = refused("train", *home.marbles(), *QUICK, "--out", out)
    assert "cannot be made" in said


def test_a_folder_of_other_things_is_left_alone(refused, home, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("all of it")
    assert "holds other files" in refused("train", *home.marbles(), "--out", tmp_path / "run", "--resume")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "all of it"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "numbers.json"
    target.write_text("before")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match="No space left"):
        files.write_json(target, {})
    assert target.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["numbers.json"]


@pytest.mark.parametrize("verb", ["evaluate", "predict", "export"])
def test_a_posterior_that_is_not_there_is_refused(refused, tmp_path, verb):
    words = ["--out", tmp_path / "x"] if verb == "export" else []
    more = ["--input", write_rows(tmp_path / "new.jsonl", question_rows("new", 2, 5))] if verb == "predict" else []
    assert "name what to" in refused(verb, *words)
    (tmp_path / "empty").mkdir()
    assert "is not a posterior" in refused(verb, tmp_path / "empty", *words, *more)


def test_damaged_posterior_and_options_are_refused_and_the_file_named(refused, swag_run, tmp_path):
    run = shutil.copytree(swag_run, tmp_path / "run")
    spread = run / "posterior" / "posterior.safetensors"
    spread.write_bytes(spread.read_bytes()[:100])
    assert "posterior.safetensors cannot be read (it is not as long as its header says)" in refused("evaluate", run)
    (run / "task.json").write_text("{}}")
    (run / "options.json").write_text('{"rank": ')
    assert "options.json cannot be read" in refused("evaluate", run)
    (run / "options.json").write_text('{"draws": "ten"}')
    assert "draws must be a whole number" in refused("evaluate", run)


def test_a_run_whose_way_to_put_rows_is_damaged_is_refused(tmp_path):
    shot = {"text": "t", "choices": ["a", "b"], "label": 0, "columns": []}
    good = {"name": "n", "classes": None, "format": {"kind": "question", "normalisation": "sum", "few_shot": [shot]}}
    write_rows(tmp_path / "task.json", [good])
    assert saved_format(tmp_path, TaskOptions(few_shot=1)).format.few_shot[0].choices == ("a", "b")
    form = good["format"]
    changes = [{"format": form | {key: value}} for key, value in (("kind", "x"), ("kind", []), ("normalisation", 1))]
    changes += [{"format": {}}, {"format": []}, {"format": "x"}, {"classes": "ab"}, {"classes": [1]}, {"name": None}]
    shots = [shot | {"label": 2}, shot | {"label": "a"}, shot | {"text": 1}, shot | {"choices": [1, 2]}, {}, 5, "x"]
    changes += [{"format": form | {"few_shot": value}} for value in (5, *([s] for s in shots))]
    for change in [*changes, {"format": form | {"few_shot": [shot | {"columns": [["a", 1]]}]}}]:
        write_rows(tmp_path / "task.json", [good | change])
        with pytest.raises(InputError, match=r"task\.json cannot be used \(.*\); copy the run again"):
            saved_format(tmp_path, TaskOptions())


def test_another_base_model_is_refused(refused, swag_run, home, tmp_path):
    from transformers import LlamaForCausalLM

    other = LlamaForCausalLM.from_pretrained(home.path / "llama")
    other.model.embed_tokens.weight.data.mul_(2)
    shutil.copytree(home.path / "llama", tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    rows = write_rows(tmp_path / "new.jsonl", question_rows("new", 2, 5))
    said = refused("predict", swag_run, "--model", tmp_path / "other", "--input", rows)
    assert "same layers with other weights" in said


def test_rows_that_cannot_be_answered_are_refused_by_their_line(refused, swag_run, tmp_path):
    rows = tmp_path / "new.jsonl"
    rows.write_text('{"question": "red", "choices": ["a", "b"]}\n{"question": \n')
    assert "new.jsonl line 2 is not valid JSON" in refused("predict", swag_run, "--input", rows)
    rows.write_text('{"question": "red"}\n')
    assert "--choice-columns" in refused("predict", swag_run, "--input", rows)
    rows.write_text("\n")
    assert "no rows" in refused("predict", swag_run, "--input", rows)
    assert "There is no file" in refused("predict", swag_run, "--input", tmp_path / "none.jsonl")


def test_outputs_are_refused_before_the_work(refused, swag_run, tmp_path, monkeypatch):
    monkeypatch.setattr("bayeslora.posteriors.loading.load_posterior", None)
    target = tmp_path / "answers.jsonl"
    target.write_text("mine")
    assert "--overwrite" in refused("predict", swag_run, "--output", target)
    assert target.read_text() == "mine"
    assert "neither .jsonl nor .csv" in refused("predict", swag_run, "--output", tmp_path / "answers.txt")
    assert "no folder" in refused("predict", swag_run, "--output", tmp_path / "no" / "answers.csv")
    assert "--overwrite" in refused("evaluate", swag_run, "--json", target)
    assert "is there already" in refused("export", swag_run, "--out", swag_run)


def test_more_solved_examples_than_the_run_keeps_are_refused(refused, swag_run, tmp_path):
    rows = write_rows(tmp_path / "new.jsonl", question_rows("new", 2, 5))
    assert "keeps 0 solved examples" in refused("predict", swag_run, "--input", rows, "--few-shot", "1")


def test_a_class_that_was_not_trained_on_is_refused(refused, bert_run, tmp_path):
    rows = [{"description": "bag holds", "colour": c} for c in ("red", "purple")]
    data = write_rows(tmp_path / "test.csv", rows)
    assert "the class 'purple'" in refused("evaluate", bert_run, "--data", data, *POINTS)


def test_settings_of_an_ensemble_reach_its_members():
    assert build_method("ensemble:3", ["kl=0.5", "dropout_draws=true"]).member == Map(kl=0.5)
    assert build_method("ensemble:3", ["kl=0.5"]).members == 3
    assert build_method("multiswag:2", ["kind=diagonal"]).member == Swag("diagonal")


def test_the_traceback_is_there_for_those_who_ask(monkeypatch, tmp_path):
    monkeypatch.setenv("BAYESLORA_TRACEBACK", "1")
    with pytest.raises(InputError):
        main(["export", str(tmp_path), "--out", str(tmp_path / "x")])


def test_local_paths_are_kept_in_full_so_that_a_run_serves_from_anywhere(swag_run):
    options = json.loads((swag_run / "options.json").read_text())
    assert Path(options["data"]).is_absolute()
    assert Path(options["model"]).is_absolute()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment, and must be a whole number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is -1"),
        ({"WORLD_SIZE": "2"}, "RANK is not set; start with accelerate launch or torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK is 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 in the environment, and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "serve is for one process, and 2 were started"),
    ],
)
def test_what_cannot_be_done_by_several_processes_is_refused(environment, words, refused, monkeypatch):
    rest = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} if "RANK" in environment else {}
    for name, value in {**rest, **environment}.items():
        monkeypatch.setenv(name, value)
    assert words in refused("serve", "run")
