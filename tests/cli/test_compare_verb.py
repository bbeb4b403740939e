"""``compare``: shared runs are trained once, a stopped comparison goes on, and its files say what the table says."""

import json
import shutil
import sys

import pytest
import transformers
from support.cli_data import POINTS, QUICK

from bayeslora.cli import main
from bayeslora.errors import InputError

METHODS = ["map", "ensemble:2", "swag", "multiswag:2"]


@pytest.fixture(scope="module")
def words(home):
    other = str(home.path / "other.jsonl")
    more = ["--methods", *METHODS, "--seeds", "0", "1", "--ood", other, "--draws", "4"]
    return ["compare", *home.marbles(), *QUICK, *POINTS, *more]


@pytest.fixture
def trainings(monkeypatch):
    """The trainings so far; ``stop_at`` makes one of them end in Ctrl-C."""
    train = transformers.Trainer.train
    seen = {"count": 0, "stop_at": None}

    def counted(self, *args, **kwargs):
        if seen["count"] == seen["stop_at"]:
            raise KeyboardInterrupt
        seen["count"] += 1
        return train(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "train", counted)
    return seen


def numbers(out):
    found = json.loads((out / "results.json").read_text())
    for row in found["rows"]:
        for cost in ("train s", "predict s", "train ×", "predict ×", "memory MB"):
            assert row.pop(cost, [0, 0])
    return found


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison") / "out"
    assert main([*words, "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_a_stopped_comparison_goes_on_without_training_anything_twice_and_ends_in_the_same_table(
    bay, words, trainings, finished, tmp_path
):
    out = tmp_path / "out"
    trainings["stop_at"] = 3
    said = bay(*words, "--out", out)
    assert said.status == 130
    assert "--resume" in said.err
    assert bay(*words, "--out", out).status == 2
    trainings["stop_at"] = None
    said = bay(*words, "--out", out, "--resume")
    assert said.status == 0, said.err
    assert trainings["count"] == 8  # two seeds of two MAP runs, and SWAG from each; the ensembles are made of these
    assert numbers(out) == numbers(finished)
    assert bay(*words, "--out", out, "--resume").status == 0
    assert trainings["count"] == 8


@pytest.mark.slow
def test_the_files_hold_the_table_the_numbers_and_the_figures(finished):
    names = {p.name for p in finished.iterdir()}
    assert {"results.json", "results.md", "reliability.png", "risk-coverage.png", "overconfidence.png"} <= names
    table = (finished / "results.md").read_text()
    found = json.loads((finished / "results.json").read_text())
    assert (found["train_rows"], found["test_rows"]) == (18, 13)
    for row in found["rows"]:
        assert f"| {row['name']}" in table
        low, high = row["accuracy"]
        assert f"{(low + high) / 2:.3f} ± {abs(low - high) / 2**0.5:.3f}" in table
    assert {"AUROC H", "AUROC MI"} <= found["rows"][-1].keys()
    assert set(found["evaluations"]) == {"base", *METHODS}


def test_other_options_and_other_folders_are_refused(refused, words, finished, tmp_path):
    assert "begun with rank=8" in refused(*words, "--rank", "4", "--out", finished, "--resume")
    assert "add --resume" in refused(*words, "--out", finished)
    out = ["--out", tmp_path / "new"]
    assert "unknown method 'swog'" in refused(*words, "--methods", "swog", *out)
    assert "names none of the methods" in refused(*words, "--set", "ivon.rank=3", *out)
    assert "swag has no setting" in refused(*words, "--set", "swag.rang=3", *out)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_draws_and_methods_may_change_when_a_comparison_goes_on_and_no_run_is_made_twice(
    bay, words, trainings, finished, tmp_path
):
    out = shutil.copytree(finished, tmp_path / "out")
    more = ["--methods", *METHODS, "loud=isotropic", "--set", "loud.sigma=0.5", "--draws", "6", "--resume"]
    said = bay(*words, *more, "--out", out)
    assert said.status == 0, said.err
    assert trainings["count"] == 0
    rows = {row["name"] for row in json.loads((out / "results.json").read_text())["rows"]}
    assert {"swag, 6 draws", "loud, 6 draws"} <= rows


def test_without_matplotlib_the_figures_are_left_out_with_a_notice(bay, words, finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out")
    for figure in out.glob("*.png"):
        figure.unlink()
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = bay(*words, "--out", out, "--resume")
    assert said.status == 0, said.err
    assert "no figures: " in said.err
    assert "matplotlib" in said.err
    assert not list(out.glob("*.png"))


def test_a_task_without_a_test_split_is_refused(refused, words, home, tmp_path):
    shutil.copy(home.path / "marbles" / "train.jsonl", tmp_path / "train.jsonl")
    assert "lacks a train or a test split" in refused(*words, "--data", tmp_path, "--out", tmp_path / "new")


@pytest.mark.slow
def test_a_label_lets_a_method_be_there_twice_and_temperatures_are_chosen_on_validation_rows(bay, home, tmp_path):
    out = tmp_path / "out"
    words = [
        "--methods",
        "map",
        "isotropic",
        "loud=isotropic",
        "--set",
        "loud.sigma=0.5",
        "--temperatures",
        "0",
        "0.01",
        "1",
    ]
    said = bay("compare", *home.marbles(), *QUICK, *POINTS, *words, "--validation", "6", "--draws", "3", "--out", out)
    assert said.status == 0, said.err
    found = json.loads((out / "results.json").read_text())
    names = [row["name"] for row in found["rows"]]
    assert names == [
        "base", "map", "isotropic, mean", "isotropic, 3 draws", "isotropic tuned, 3 draws",
        "loud, mean", "loud, 3 draws", "loud tuned, 3 draws",
    ]  # fmt: skip
    means = {row["name"]: row["NLL"] for row in found["rows"]}
    assert means["isotropic, mean"] == pytest.approx(means["map"])  # isotropic noise is around MAP, trained once
    assert means["loud, 3 draws"] != means["isotropic, 3 draws"]
    assert set(found["temperatures"]["loud tuned"].values()) <= {0.0, 0.01, 1.0}
    assert (
        "two methods are called"
        in bay("compare", *home.marbles(), "--methods", "map", "map", "--out", tmp_path / "b").err
    )


def test_temperatures_without_validation_rows_are_refused(refused, home, tmp_path):
    words = ["--methods", "isotropic", "--temperatures", "1", "--validation", "0", "--out", tmp_path / "out"]
    assert "validation" in refused("compare", *home.marbles(), *QUICK, *words)


def test_a_colon_makes_an_ensemble_of_any_method():
    from bayeslora.cli.settings import build_method
    from bayeslora.methods import Ensemble, Ivon

    assert build_method("ivon:3", ["sigma0=0.1"]) == Ensemble(3, Ivon(sigma0=0.1))


@pytest.mark.slow
def test_scaling_is_shown_for_every_method_and_helps_its_validation_rows(bay, home, tmp_path):
    out = tmp_path / "out"
    words = ["--methods", "map", "isotropic", "temperature", "--set", "isotropic.sigma=0.3", "--temperature-scaling"]
    said = bay("compare", *home.marbles(), *QUICK, *POINTS, *words, "--validation", "6", "--draws", "3", "--out", out)
    assert said.status == 0, said.err
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert {"map", "map + T", "isotropic, 3 draws", "isotropic + T, 3 draws", "temperature"} <= rows.keys()
    assert rows["map + T"]["NLL"] == pytest.approx(rows["temperature"]["NLL"])  # it is MAP, scaled
    assert rows["map + T"]["accuracy"] == rows["map"]["accuracy"]
    assert rows["temperature"]["train ×"][0] >= 1
    assert (out / "trade-off.png").stat().st_size > 0


@pytest.mark.slow
def test_noise_scaled_by_divergence_has_a_row_of_its_own(bay, refused, home, tmp_path):
    words = ["compare", *home.marbles(), *QUICK, *POINTS, "--draws", "3", "--methods", "map", "isotropic", "tfb"]
    by_itself = ["--set", "tfb.scale=divergence", "tfb.divergence=0.0001"]
    out = ["--out", tmp_path / "out"]
    said = bay(*words, *by_itself, "--divergence", "0.0001", *out)
    assert said.status == 0, said.err
    rows = {row["method"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]}
    more = ["isotropic, scaled by divergence", "tfb, scaled by divergence"]
    assert list(rows) == ["base", "map", "isotropic", more[0], "tfb", more[1]]
    assert "isotropic, scaled by divergence, 3 draws" in said.out
    assert "divergence must be" in refused(*words, "--divergence", "-1", "--out", tmp_path / "other")


def test_a_folder_that_has_a_known_tasks_name_does_not_hide_the_task(refused, bay, home, tmp_path, monkeypatch):
    (tmp_path / "openbookqa").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["compare", *home.marbles(), *QUICK, "--methods", "map", "--ood"]
    assert "test" in refused(*words, "./openbookqa", "--out", "a")  # the folder, which is empty
    monkeypatch.setattr(
        "bayeslora.cli.data.load_task", lambda *given, **_: (_ for _ in ()).throw(InputError(str(given)))
    )
    from support.tiny import make_split

    from bayeslora.cli.data import other_splits
    from bayeslora.cli.options import TaskOptions

    with pytest.raises(InputError, match="openbookqa"):
        other_splits(["openbookqa"], TaskOptions(), make_split("test", 3, 0, classes=False))


def test_all_stands_for_every_method_and_labels_cannot_leave_the_folder(refused, home, tmp_path):
    from bayeslora.cli.settings import EVERY, build_methods
    from bayeslora.methods import METHODS

    assert {name.partition(":")[0] for name in EVERY} == METHODS.keys()
    assert [name for name in EVERY if ":" in name] == ["ensemble:3", "multiswag:3"]
    assert list(build_methods(["all", "elbo=blob"], [])) == [*EVERY, "elbo"]
    assert "without a slash" in refused("compare", *home.marbles(), "--methods", "a/b=map", "--out", tmp_path / "b")
