"""`compare` and `planned_steps` on the tiny models."""

from dataclasses import replace

import pytest
import torch
from support.tiny import arguments, make_model, make_split, make_task

from bayeslora.comparison.cached_runs import CachedRuns, planned_steps
from bayeslora.comparison.run import compare
from bayeslora.comparison.tables import comparison_rows, marked, text_table
from bayeslora.errors import InputError
from bayeslora.methods import Ensemble, Isotropic, Map, Swag, Temperature, Tfb
from bayeslora.params import read
from bayeslora.posteriors import Point
from bayeslora.posteriors.loading import load_posterior
from bayeslora.prediction import predict
from bayeslora.tasks.types import Task


def cached(tokenizer, out, **changes):
    task = changes.pop("task", make_task(readout="likelihood"))
    args = arguments(out / "training", **changes)
    lines = []
    return CachedRuns(make_model("llama"), tokenizer, task, args, out, resamples=0, draws=2, report=lines.append)


def test_map_is_the_ensembles_first_member_and_swag_begins_at_it(tokenizer, tmp_path):
    own = cached(tokenizer, tmp_path, max_steps=4)
    found = compare(own, {"map": Map(), "ensemble": Ensemble(2), "swag": Swag("swa")}, [0])
    point, both = (found.results[name][0].prediction for name in ("map", "ensemble"))
    assert torch.equal(both.log_probs[0], point.log_probs[0])
    assert not torch.equal(both.log_probs[1], point.log_probs[0])
    assert sorted(p.name for p in (tmp_path / "seed-0").iterdir() if p.is_dir()) == [
        next((tmp_path / "seed-0").glob(f"{name}-*")).name for name in ("map-0", "map-1", "swag-0")
    ]
    costs = {name: by_seed[0].cost for name, by_seed in found.results.items()}
    assert costs["ensemble"].train_seconds > costs["map"].train_seconds
    assert costs["swag"].train_seconds > costs["map"].train_seconds  # as if it shared nothing
    assert costs["ensemble"].disk > costs["map"].disk > 0


def test_settings_of_a_method_make_a_run_of_its_own(tokenizer, tmp_path):
    compare(cached(tokenizer, tmp_path, max_steps=2), {"map": Map(), "decayed": Map(weight_decay=1.0)}, [0])
    runs = sorted(p.name for p in (tmp_path / "seed-0").iterdir() if p.is_dir())
    assert len(runs) == 2
    one, other = (load_posterior(tmp_path / "seed-0" / name / "posterior") for name in runs)
    assert any(not torch.equal(one.mean[name], other.mean[name]) for name in one.mean)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({"max_steps": 7}, 7), ({"max_steps": -1, "num_train_epochs": 3}, 18),
     ({"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}, 6)],
)  # fmt: skip
def test_planned_steps_are_those_of_the_trainer(tokenizer, tmp_path, changes, steps):
    assert planned_steps(cached(tokenizer, tmp_path, **changes)) == steps


def test_a_comparison_of_nothing_is_refused(tokenizer, tmp_path):
    with pytest.raises(InputError, match="at least one method and one seed"):
        compare(cached(tokenizer, tmp_path), {}, [0])
    full = make_task(readout="likelihood")
    untested = cached(tokenizer, tmp_path, task=Task("bags", full.train, None, None))
    with pytest.raises(InputError, match="no test examples"):
        compare(untested, {"map": Map()}, [0])


@pytest.mark.slow
def test_a_method_that_cannot_be_fitted_is_reported_and_the_others_are_compared(tokenizer, tmp_path, monkeypatch):
    fit, seen = Tfb.fit, []

    def failing(self, model, task, *, seed=0, **rest):
        seen.append(seed)
        if len(seen) > 1:
            raise InputError("TFB found no noise that the anchors' loss bears")
        return fit(self, model, task, seed=seed, **rest)

    monkeypatch.setattr(Tfb, "fit", failing)
    own = cached(tokenizer, tmp_path, max_steps=2)
    own = replace(own, scaling=True, scaling_without_labels=True, temperatures=(0.1, 1.0))
    found = compare(own, {"map": Map(), "tfb": Tfb(sigma=0.01), "isotropic": Isotropic(0.01)}, [0, 1, 2])
    assert found.failures == {"tfb": {1: "TFB found no noise that the anchors' loss bears"}}
    assert len(seen) == 2  # not tried again under the third seed
    assert {name.split()[0] for name in found.results} == {"base", "map", "isotropic"}
    assert all(len(by_seed) == 3 for by_seed in found.results.values())
    assert not any(name.startswith("tfb") for name in found.results)


def test_a_comparison_in_which_nothing_can_be_fitted_is_refused(tokenizer, tmp_path, monkeypatch):
    def failing(self, model, task, **rest):
        raise InputError("the curvature is not finite")

    monkeypatch.setattr(Tfb, "fit", failing)
    with pytest.raises(InputError, match="no method could be fitted; tfb under seed 3: the curvature is not finite"):
        compare(cached(tokenizer, tmp_path, max_steps=2), {"tfb": Tfb(sigma=0.01)}, [3])


def test_the_base_has_the_first_row_and_answers_each_split_once(tokenizer, tmp_path):
    own = replace(cached(tokenizer, tmp_path, max_steps=2), ood={"other": make_split("other", 6, 9, classes=False)})
    own = replace(own, ood={"other": replace(own.ood["other"], format=own.test.format)})
    found = compare(own, {"map": Map(), "isotropic": Isotropic(0.1)}, [0, 1])
    assert list(found.results) == ["base", "map", "isotropic"]
    untuned = predict(make_model("llama"), Point(read(make_model("llama"))), own.test, base=True, tokenizer=tokenizer)
    for seed, result in found.results["base"].items():
        torch.testing.assert_close(result.prediction.log_p, untuned.base_log_probs, rtol=1e-4, atol=1e-4)
        assert (result.cost.train_seconds, result.cost.disk) == (0, 0)
        for name in ("map", "isotropic"):
            of = found.results[name][seed]
            assert torch.equal(of.prediction.base_log_probs, result.prediction.log_p)
            assert torch.equal(of.ood["other"].base_log_probs, result.ood["other"].log_p)
            assert "other/auroc_likelihood_ratio" in of.evaluation.rows["draws"]
    assert [row.name for row in comparison_rows(found)] == ["base", "map", "isotropic, mean", "isotropic, 2 draws"]
    assert {"AUROC LR", "AUROC drift"} <= comparison_rows(found)[1].numbers.keys()
    head = [word.strip() for word in text_table(comparison_rows(found)).splitlines()[0].split("  ") if word.strip()]
    at = head.index("AUROC MI")
    assert head[at : at + 4] == ["AUROC MI", "AUROC LR", "AUROC drift", "train s"]
    rows = marked(found, comparison_rows(found), own.test.labels, resamples=20)
    assert "best" in {(row.marks or {}).get("AUROC drift") for row in rows}
    assert {p.name.partition("-test-")[0] for p in tmp_path.glob("base-*test*.safetensors")} == {"base-bags"}
    assert len(list(tmp_path.glob("base-*.safetensors"))) == 2  # of the test rows and of the others, for both seeds
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("base-*")}
    again = compare(own, {"map": Map()}, [0])
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("base-*")} == before
    assert torch.equal(again.results["base"][0].prediction.log_p, found.results["base"][0].prediction.log_p)


def test_without_labels_every_method_is_scaled_by_what_the_base_says(tokenizer, tmp_path):
    own = replace(cached(tokenizer, tmp_path, max_steps=2), scaling=True, scaling_without_labels=True)
    found = compare(own, {"map": Map(), "temperature": Temperature(labels=False)}, [0])
    assert list(found.results) == ["base", "map", "map + T", "map + T without labels", "temperature"]
    by_row, by_method = (found.results[name][0].prediction for name in ("map + T without labels", "temperature"))
    torch.testing.assert_close(by_row.log_probs, by_method.log_probs)
    assert not torch.allclose(by_row.log_probs, found.results["map + T"][0].prediction.log_probs, atol=1e-3)


def test_where_the_head_is_new_there_is_no_row_of_the_base_and_one_line_says_so(tokenizer, tmp_path):
    lines = []
    own = cached(tokenizer, tmp_path, max_steps=2, task=make_task(classes=True))
    own = replace(own, model=make_model("bert"), report=lines.append)
    found = compare(own, {"map": Map()}, [0])
    assert list(found.results) == ["map"]
    (line,) = [line for line in lines if "base" in line]
    assert line.startswith("no row base: the base has no answer of its own")
    with pytest.raises(InputError, match="the base has no answer of its own"):
        compare(replace(own, scaling_without_labels=True), {"map": Map()}, [0])
    with pytest.raises(InputError, match="the base has no answer of its own"):
        compare(own, {"t": Temperature(labels=False)}, [0])


def test_a_base_that_never_agrees_leaves_the_row_out_with_a_line(tokenizer, tmp_path, monkeypatch):
    def never(self, prediction, rows):
        raise InputError("the base agrees with the draws on none of 8 validation rows")

    lines, own = [], replace(cached(tokenizer, tmp_path, max_steps=2), scaling_without_labels=True)
    monkeypatch.setattr(Temperature, "scaling", never)
    found = compare(replace(own, report=lines.append), {"map": Map()}, [0])
    assert list(found.results) == ["base", "map"]
    assert "seed 0: no row map + T without labels: the base agrees with the draws on none of 8" in lines[-1]


def test_a_method_cannot_be_called_base(tokenizer, tmp_path):
    with pytest.raises(InputError, match="a method is called base"):
        compare(cached(tokenizer, tmp_path), {"base": Map()}, [0])
