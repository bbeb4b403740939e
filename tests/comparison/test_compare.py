"""`compare` and `planned_steps` on the tiny models."""

from dataclasses import replace

import pytest
import torch
from support.tiny import arguments, make_model, make_task

from bayeslora.comparison.cached_runs import CachedRuns, planned_steps
from bayeslora.comparison.run import compare
from bayeslora.errors import InputError
from bayeslora.methods import Ensemble, Isotropic, Map, Swag, Tfb
from bayeslora.posteriors.loading import load_posterior
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


def test_a_method_that_cannot_be_fitted_is_reported_and_the_others_are_compared(tokenizer, tmp_path, monkeypatch):
    fit, seen = Tfb.fit, []

    def failing(self, model, task, *, seed=0, **rest):
        seen.append(seed)
        if len(seen) > 1:
            raise InputError("TFB found no noise that the anchors' loss bears")
        return fit(self, model, task, seed=seed, **rest)

    monkeypatch.setattr(Tfb, "fit", failing)
    own = cached(tokenizer, tmp_path, max_steps=2)
    own = replace(own, scaling=True, temperatures=(0.1, 1.0))
    found = compare(own, {"map": Map(), "tfb": Tfb(sigma=0.01), "isotropic": Isotropic(0.01)}, [0, 1, 2])
    assert found.failures == {"tfb": {1: "TFB found no noise that the anchors' loss bears"}}
    assert len(seen) == 2  # not tried again under the third seed
    assert {name.split()[0] for name in found.results} == {"map", "isotropic"}
    assert all(len(by_seed) == 3 for by_seed in found.results.values())
    assert not any(name.startswith("tfb") for name in found.results)


def test_a_comparison_in_which_nothing_can_be_fitted_is_refused(tokenizer, tmp_path, monkeypatch):
    def failing(self, model, task, **rest):
        raise InputError("the curvature is not finite")

    monkeypatch.setattr(Tfb, "fit", failing)
    with pytest.raises(InputError, match="no method could be fitted; tfb under seed 3: the curvature is not finite"):
        compare(cached(tokenizer, tmp_path, max_steps=2), {"tfb": Tfb(sigma=0.01)}, [3])
