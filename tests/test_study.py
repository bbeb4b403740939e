"""The study goes on where it was, its lines hold what its questions need, and its report says what is in them."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support.cli_data import question_rows, write_rows
from support.tiny import make_base, make_tokenizer

STUDY = Path(__file__).parents[1] / "benchmarks" / "study"
NAMES = ("cells", "figures", "goals", "lines", "paired", "questions", "report", "run", "tables", "variants")


@pytest.fixture
def study(monkeypatch):
    """Return the study's modules by name."""
    monkeypatch.syspath_prepend(STUDY)
    before = {name: sys.modules.pop(name, None) for name in NAMES}
    yield {name: __import__(name) for name in NAMES}
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a tiny model, two tasks and a study of them."""
    path = tmp_path_factory.mktemp("study")
    make_base("llama").save_pretrained(path / "llama")
    make_tokenizer().save_pretrained(path / "llama")
    for task, seed in (("arc_easy", 0), ("openbookqa", 5)):
        for split, count in (("train", 30), ("test", 17)):
            write_rows(path / task / f"{split}.jsonl", question_rows(split, count, seed + len(split)))
    cell = {
        "model": "causal", "readout": "likelihood", "task": "arc_easy", "train_rows": 16, "validation": 8,
        "test_rows": 12, "foreign": ["openbookqa"], "foreign_rows": 9, "draws": {"count": 3}, "divergence": 1e-5,
        "model_options": {"target_modules": ["q_proj", "v_proj"]},
        "training": {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01},
    }  # fmt: skip
    methods = {
        "base": {}, "map": {}, "ivon": {"controls": ["same", "matched"]}, "swag": {"settings": ["rank=2"]},
        "ensemble": {"method": "ensemble:2"}, "isotropic": {"scaled": True},
    }  # fmt: skip
    content = {"seeds": [0, 1], "methods": methods, "cells": {"tiny": cell}}
    (path / "study.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def run(study, place, monkeypatch, *words):
    """Run the study in its folder."""
    folders = {"--data": ".", "--study": "study.yaml", "--results": "results", "--out": "runs", "--model": "llama"}
    line = [part for option, folder in folders.items() for part in (option, str(place / folder))]
    monkeypatch.setattr(sys, "argv", ["run.py", *line, *words])
    study["run"].main()


@pytest.fixture
def finished(study, place, monkeypatch):
    """Return the lines of the whole study, made by the first test that asks for them."""
    file = place / "results" / "tiny.jsonl"
    if not file.exists():
        run(study, place, monkeypatch)
    return study["lines"].read([file])


@pytest.mark.slow
def test_every_method_and_what_follows_from_it_has_a_line_under_every_seed(finished):
    controls = {f"ivon, isotropic of the same {what}" for what in ("variance", "cost")}
    rows = {"map", "ivon", "swag", "ensemble", "isotropic", "isotropic, scaled by divergence", *controls}
    wanted = {(row + end, seed) for row in rows for end in ("", " + T") for seed in (0, 1)} | {("base", 0), ("base", 1)}
    assert wanted <= {(line["row"], line["seed"]) for line in finished}
    for line in finished:
        assert {"accuracy", "nll", "ece", "openbookqa/auroc_entropy"} <= line["metrics"]["draws"].keys()
        assert line["versions"].keys() >= {"bayeslora", "torch", "transformers", "peft"}
        assert (line["cost"]["train_seconds"] > 0) == (line["row"] != "base")
        assert line["row"] != "map" or line["rows"]["prompt ratio"].keys() == {"test", "openbookqa"}


@pytest.mark.slow
def test_the_numbers_of_a_line_can_be_found_again_in_its_rows(study, finished):
    lines, row = study["paired"].Lines(finished, 10), study["paired"].Row
    for line in finished:
        for predictor in line["metrics"]:
            found = dict(
                zip(
                    lines.seeds("tiny", line["row"]),
                    lines.values("tiny", row(line["row"], predictor), "nll"),
                    strict=True,
                )
            )
            assert found[line["seed"]] == pytest.approx(line["metrics"][predictor]["nll"], abs=2e-3)


@pytest.mark.slow
def test_what_is_there_is_not_made_again_and_what_was_cut_off_is(study, place, finished, monkeypatch):
    file = place / "results" / "tiny.jsonl"
    before = file.read_text(encoding="utf-8")
    run(study, place, monkeypatch)
    assert file.read_text(encoding="utf-8") == before
    kept = [text for text in before.splitlines() if not ('"method": "ivon"' in text and '"seed": 1' in text)]
    file.write_text("\n".join(kept) + "\n" + before.splitlines()[-1][:50], encoding="utf-8")  # as a full disk leaves it
    run(study, place, monkeypatch)
    again = study["lines"].read([file])
    assert {(one["row"], one["seed"]) for one in again} == {(one["row"], one["seed"]) for one in finished}
    same = {(one["row"], one["seed"]): one["metrics"] for one in finished}
    assert all(one["metrics"] == same[one["row"], one["seed"]] for one in again)


@pytest.mark.slow
def test_the_report_fills_in_its_pages_and_nothing_else(study, place, finished, monkeypatch, tmp_path):
    root, docs = STUDY.parents[1], tmp_path / "docs"
    shutil.copytree(root / "docs", docs, ignore=shutil.ignore_patterns("*.png"))
    shutil.copy(root / "README.md", tmp_path)
    before = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.md")}
    words = ["--results", str(place / "results"), "--docs", str(docs), "--resamples", "20"]
    words += ["--study", str(place / "study.yaml"), "--least-seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["report.py", *words])
    study["report"].main()
    part = re.compile("(study:begin .* -->).*?(<!-- study:end)", re.DOTALL)
    for path, text in before.items():
        assert part.sub(r"\1\2", path.read_text(encoding="utf-8")) == part.sub(r"\1\2", text)
    changed = {path.relative_to(tmp_path).as_posix() for path in before if path.read_text("utf-8") != before[path]}
    of_methods = {f"docs/methods/{name}.md" for name in ("map", "temperature", "ivon", "swag", "ensemble", "isotropic")}
    of_study = {"README.md", "docs/study.md", "docs/study-tables.md", "docs/choosing.md"}
    assert changed == {*of_methods, *of_study, "docs/methods/divergence.md"}
    for name in ("study.md", "methods/ivon.md"):
        assert "IVON + T" in (docs / name).read_text(encoding="utf-8")
    assert "12 of 12" in (docs / "study.md").read_text(encoding="utf-8")  # six methods under two seeds
    assert (docs / "assets" / "study-draws.png").stat().st_size > 1000
    told = (docs / "methods" / "ivon.md").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["report.py", *words[:-1], "3"])
    study["report"].main()
    assert (docs / "methods" / "ivon.md").read_text(encoding="utf-8") == told
    assert "Answers" not in (docs / "study.md").read_text(encoding="utf-8").partition("study:begin")[2]


def test_every_part_that_is_made_of_lines_has_a_page_and_a_page_without_one_is_refused(study):
    methods = yaml.safe_load((STUDY / "study.yaml").read_text(encoding="utf-8"))["methods"]
    pages = {study["report"].PAGES.get(name, name) for name in methods if name != "base"}
    for page in (*pages, "temperature", "divergence"):
        text = (STUDY.parents[1] / "docs" / "methods" / f"{page}.md").read_text(encoding="utf-8")
        assert "of today" in study["report"].filled(text, page, "of today")
    with pytest.raises(ValueError, match="0 parts <!-- study:begin ivon -->"):
        study["report"].filled("a page without a part", "ivon", "of today")


def line(study, seed, row, log_p, labels, foreign=None):
    """Return a line as the study writes it, as far as the questions read it."""
    splits = {"test": log_p} | ({} if foreign is None else {"f": foreign})
    packed = {name: study["lines"].packed(values) for name, values in splits.items()}
    return {
        "cell": "c", "seed": seed, "row": row, "config": {"foreign": [] if foreign is None else ["f"]}, "by draws": {},
        "rows": {"labels": labels.tolist(), "mean": packed, "draws": packed},
    }  # fmt: skip


def synthetic(study, seeds, count, factors, foreign=None):
    """Return lines of rows that scale the logits which the labels were drawn from, by a factor each."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for seed in range(seeds):
        logits = 2 * torch.randn(count, 3, generator=generator)
        labels = torch.distributions.Categorical(logits=logits).sample()
        for row, factor in factors.items():
            found.append(line(study, seed, row, (factor * logits).log_softmax(-1), labels, foreign))
    return found


def test_a_paired_difference_is_told_from_chance_and_small_ones_are_the_same(study):
    found = synthetic(study, 5, 200, {"true": 1.0, "sharp": 4.0, "nearly": 1.01})
    lines = study["paired"].Lines(found, 400)
    pairs = [("true", "sharp"), ("sharp", "true"), ("nearly", "true")]  # the last differs too, by less than the margin
    row = study["paired"].Row
    compared = [lines.compared(row(a, "mean"), row(b, "mean"), "nll", ["c"]) for a, b in pairs]
    assert [d.verdict for d in study["paired"].corrected(compared)] == ["better", "worse", "same"]
    assert compared[0].value == pytest.approx(-compared[1].value)
    assert compared[0].low <= compared[0].value <= compared[0].high


def test_a_score_by_the_number_of_draws_is_of_those_that_all_seeds_have(study):
    found = synthetic(study, 2, 50, {"map": 2.0, "ivon": 1.0})
    said = {("ivon", 0): {"1": 0.5, "2": 0.4, "5": 0.3}, ("ivon", 1): {"1": 0.7, "2": 0.6}, ("map", 0): {"1": 0.9}}
    for one in found:
        one["by draws"] = {count: {"nll": nll} for count, nll in said.get((one["row"], one["seed"]), {}).items()}
    lines = study["paired"].Lines(found, 10)
    assert lines.by_draws("c", "ivon", "nll") == pytest.approx({1: 0.6, 2: 0.5})
    assert lines.by_draws("c", "map", "nll") == {}  # the second seed says none
    assert lines.by_draws("c", "swag", "nll") == {}
    head, *body = study["tables"].by_draws(lines, "c", "nll")
    assert head == ["", "mean", "1", "2"]
    mean = sum(lines.values("c", study["paired"].Row("ivon", "mean"), "nll")) / 2
    assert body == [["IVON", f"{mean:.3f}", "0.600", "0.500"]]


def test_goals_are_met_or_missed_by_what_the_lines_say(study):
    factors = {"map": 3.0, "map + T": 1.0, "map + T without labels": 1.05, "base": 0.5, "tfb": 2.0}
    factors["tfb, scaled by divergence"] = 1.5
    found = synthetic(study, 3, 300, factors, foreign=torch.zeros(100, 3).log_softmax(-1))
    table = study["goals"].goals_table(study["paired"].Lines(found, 10))
    assert [said for _, _, said in table[1:]] == ["met", "missed", "met"]  # entropy tells all: nothing is better
    assert "on 0 of 1" in table[2][1]
    assert "on 3 of 3" in table[3][1]
    worse = [each | {"row": "tfb, scaled by divergence"} for each in found if (each["row"], each["seed"]) == ("map", 1)]
    lines = study["paired"].Lines([*found, *worse], 10)
    assert study["goals"].goals_table(lines)[3][2] == "missed"


def test_holms_correction(study):
    paired = study["paired"]
    given = [
        paired.Difference(("a", "mean"), ("b", "mean"), "nll", ("c",), 1.0, 0.5, 1.5, p) for p in (0.03, 0.01, 0.04)
    ]
    wanted = [0.06, 0.03, 0.06]  # 2 · .03, 3 · .01, and what is larger of .04 and .06
    assert [d.p for d in paired.corrected(given)] == pytest.approx(wanted)


def test_packed_numbers_come_back_as_probabilities(study):
    log_p = torch.tensor([[0.9, 0.1, 0.0], [1e-4, 0.5, 0.4999]]).log()
    back = study["lines"].unpacked(study["lines"].packed(log_p))
    assert back.exp().sum(-1).tolist() == pytest.approx([1, 1])
    torch.testing.assert_close(back.exp(), log_p.exp().double(), atol=1e-3, rtol=0)
    assert math.isinf(float(back[0, 2]))


def test_the_files_of_the_study_name_what_there_is(study):
    for name in ("study.yaml", "full.yaml"):
        cells, seeds = study["cells"].read_study(STUDY / name)
        assert len(seeds) == 5
        assert all(cell.entries for cell in cells)
        keys = [study["run"].key_of(cell, entry) for cell in cells for entry in cell.entries]
        assert len(set(keys)) == len(keys)


@pytest.mark.slow
def test_the_full_grid_fits_together_without_weights(study):
    cells, _ = study["cells"].read_study(STUDY / "full.yaml")
    said = [study["cells"].checked(cell) for cell in (cells[0], cells[-1])]
    assert "13.5 GB of weights, 4,194,304 adapter parameters" in said[0]  # 2 · (4096 + 4096) · 8 · 32
    assert "3,833,856 adapter parameters" in said[1]  # (4096 + 4096 + 4096 + 1024) · 8 · 36


def test_cells_that_repeat_another_with_fewer_rows_are_asked_about_data_alone(study):
    names = {"a-task": 200, "a-task-800": 800, "a-task-50": 50, "a-task-50-long": 50, "b-task": 60}
    seen = study["paired"].Lines(
        [{"cell": cell, "row": "map", "seed": 0, "config": {"train_rows": rows}} for cell, rows in names.items()]
    )
    assert study["questions"].main_cells(seen) == ["a-task", "b-task"]
    assert study["questions"].by_size(seen) == ["a-task-50", "a-task-50-long", "a-task", "a-task-800"]


def test_how_much_data_is_asked_of_methods_that_ran_with_more_than_one_size(study):
    sizes, factors = {"c": 200, "c-50": 50}, {"map": 3.0, "map + T": 1.0, "ivon": 1.5, "tfb": 2.0}
    found = [
        one | {"cell": cell, "config": one["config"] | {"train_rows": rows}}
        for cell, rows in sizes.items()
        for one in synthetic(study, 3, 100, factors)
        if (cell, one["row"]) != ("c-50", "tfb")
    ]
    seen = study["paired"].Lines(found, 10)
    asked = next(question for question in study["questions"].questions(seen) if question.name == "size")
    assert {words for words, _ in asked.differences(seen)} == {"ivon, c-50", "ivon, c"}


def test_committed_lines_can_be_read(study):
    for file in sorted(study["lines"].RESULTS.glob("*.jsonl")):
        for text in file.read_text(encoding="utf-8").splitlines():
            assert json.loads(text)["cell"] == file.stem
