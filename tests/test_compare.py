"""`compare` and `planned_steps` on the tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import arguments, make_model, make_task

from bayeslora.compare import compare
from bayeslora.errors import InputError
from bayeslora.methods import Ensemble, Map, Swag
from bayeslora.storage import load_posterior
from bayeslora.study import SEED_STRIDE, Study, planned_steps
from bayeslora.tasks.types import Task


def study(tokenizer, out: Path, **changes) -> Study:
    task = changes.pop("task", make_task(readout="likelihood"))
    args = arguments(out / "training", **changes)
    lines: list[str] = []
    return Study(make_model("llama"), tokenizer, task, args, out, resamples=0, draws=2, report=lines.append)


def test_map_is_the_ensembles_first_member_and_swag_begins_at_it(tokenizer, tmp_path):
    own = study(tokenizer, tmp_path, max_steps=4)
    found = compare(own, {"map": Map(), "ensemble": Ensemble(2), "swag": Swag("swa")}, [0])
    point, both = found.predictions["map"][0], found.predictions["ensemble"][0]
    assert torch.equal(both.log_probs[0], point.log_probs[0])
    assert not torch.equal(both.log_probs[1], point.log_probs[0])
    assert sorted(p.name for p in (tmp_path / "seed-0").iterdir() if p.is_dir()) == [
        "map-0",
        "map-1",
        f"{next((tmp_path / 'seed-0').glob('swag*-0')).name}",
    ]
    costs = {name: by_seed[0] for name, by_seed in found.costs.items()}
    assert costs["ensemble"].train_seconds > costs["map"].train_seconds
    assert costs["swag"].train_seconds > costs["map"].train_seconds  # as if it shared nothing
    assert costs["ensemble"].disk > costs["map"].disk > 0


def test_settings_of_a_method_make_a_run_of_its_own(tokenizer, tmp_path):
    compare(study(tokenizer, tmp_path, max_steps=2), {"map": Map(), "decayed": Map(weight_decay=1.0)}, [0])
    runs = sorted(p.name for p in (tmp_path / "seed-0").iterdir() if p.is_dir())
    assert len(runs) == 2
    one, other = (load_posterior(tmp_path / "seed-0" / name / "posterior") for name in runs)
    assert any(not torch.equal(one.mean[name], other.mean[name]) for name in one.mean)


def test_seeds_and_members_never_share_a_start():
    seeds = {s * SEED_STRIDE + k for s in range(5) for k in range(SEED_STRIDE)}
    assert len(seeds) == 5 * SEED_STRIDE


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({"max_steps": 7}, 7), ({"max_steps": -1, "num_train_epochs": 3}, 18),
     ({"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}, 6)],
)  # fmt: skip
def test_planned_steps_are_those_of_the_trainer(tokenizer, tmp_path, changes, steps):
    assert planned_steps(study(tokenizer, tmp_path, **changes)) == steps


def test_a_comparison_of_nothing_is_refused(tokenizer, tmp_path):
    with pytest.raises(InputError, match="at least one method and one seed"):
        compare(study(tokenizer, tmp_path), {}, [0])
    full = make_task(readout="likelihood")
    untested = study(tokenizer, tmp_path, task=Task("bags", full.train, None, None))
    with pytest.raises(InputError, match="no test examples"):
        compare(untested, {"map": Map()}, [0])
