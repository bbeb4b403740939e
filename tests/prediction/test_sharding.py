"""Predictions and fits whose rows are spread over the processes of a run are those of one process."""

import os
from contextlib import contextmanager

import pytest
import torch
from support.forked import in_ranks
from support.tiny import gaussian, make_model, make_task, make_tokenizer

import bayeslora as bl
from bayeslora.errors import InputError
from bayeslora.methods import Laplace, Temperature, Tfb
from bayeslora.posteriors import Draws, Linearised, Mixture, Scaled, TokenDropout
from bayeslora.prediction.progress import shown_by
from bayeslora.processes import everywhere, first

pytestmark = pytest.mark.slow

TASK = make_task(readout="likelihood")
ROWS = TASK.test  # 13, which two processes cannot share evenly
SCALING = {"draws.weight": 2.0, "draws.bias": 0.0, "mean.weight": 2.0, "mean.bias": 0.0}


def posteriors(model):
    """What answers in its own way: weights, a mixture, scaled answers, linearised ones, and noise by the batch."""
    one = gaussian(model)
    dropout = TokenDropout(one.mean, 0.3, one.origin)
    return {
        "weights": one,
        "mixture": Mixture((one, one), one.origin),
        "scaled": Scaled(one, {name: torch.tensor([value]) for name, value in SCALING.items()}, one.origin),
        "linearised": Linearised(one, one.origin),
        "dropout": dropout,
        "mixed": Mixture((one, dropout), one.origin),
    }


def predictions(model, tokenizer):
    """Everything that is predicted, by one process or by all."""

    def log_probs(rows, draws):
        return bl.predict(model, gaussian(model), rows, draws, tokenizer=tokenizer).log_probs

    found = {
        "stopping early": log_probs(ROWS, Draws(40, tolerance=0.006, minimum=4)),
        "fewer rows than processes": log_probs(ROWS.take([0]), 2),
    }
    for name, posterior in posteriors(model).items():
        prediction = bl.predict(model, posterior, ROWS, 4, base=True, tokenizer=tokenizer)
        names = ("log_probs", "mean_log_probs", "monte_carlo_error", "base_log_probs")
        parts = [getattr(prediction, name) for name in names]
        found |= {f"{name}, {k}": part for k, part in enumerate(parts)}
    return found


def fits(model, tokenizer):
    """Everything that is fitted on rows, by one process or by all."""
    found = {}
    for structure, predictive, samples in (("kron", "linearised", 0), ("diag", "draws", 2)):
        method = Laplace(structure=structure, predictive=predictive, samples=samples)
        posterior = method.fit(model, TASK, tokenizer=tokenizer, progress=False)
        found[f"laplace {structure}"] = bl.predict(model, posterior, ROWS, 4, tokenizer=tokenizer).probs
    evidence = Laplace(prior="marginal").fit(model, TASK, tokenizer=tokenizer, progress=False)
    found["evidence"] = torch.tensor(evidence.posterior.precision).log()
    noisy = Tfb(steps=2).fit(model, TASK, tokenizer=tokenizer, progress=False)
    found["tfb"] = torch.cat([value.flatten() for value in noisy.variance.values()])
    scaled = Temperature().fit(model, TASK, start=gaussian(model), tokenizer=tokenizer, progress=False)
    found["temperature"] = scaled.scaling["draws.weight"]
    return found


def work():
    model, tokenizer = make_model(), make_tokenizer()
    return predictions(model, tokenizer) | fits(model, tokenizer)


def test_rows_that_are_spread_over_processes_have_the_answers_of_one_process(tmp_path):
    seen = []

    @contextmanager
    def noted(name, total):
        seen.append(total)
        yield lambda count: None

    def passes():
        seen.clear()
        with shown_by(noted):
            bl.predict(make_model(), gaussian(make_model()), ROWS, 2, mean=False, tokenizer=make_tokenizer(),
                       options=bl.PassOptions(progress=True))  # fmt: skip
        return seen[0]

    def ranks():
        apart = passes()
        with bl.sharded():
            torch.save({"passes": (apart, passes()), **work()}, tmp_path / f"{os.environ['RANK']}.pt")

    ended = in_ranks(ranks)
    assert [status for status, _ in ended] == [0, 0], ended
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert (one.pop("passes"), other.pop("passes")) == ((26, 14), (26, 12))  # of 13 rows under 2 draws
    for name, value in work().items():
        torch.testing.assert_close(one[name], value, rtol=2e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(one[name], other[name]), name


def test_what_one_process_refuses_all_refuse():
    def fails():
        if os.environ["RANK"] == "1":
            raise InputError("row 3 is bad")

    def refused():
        with pytest.raises(InputError, match="row 3 is bad"):
            everywhere(fails)
        with pytest.raises(InputError, match="no place to write"):
            first(cannot_write)

    def cannot_write():
        raise InputError("no place to write")

    assert [status for status, _ in in_ranks(refused)] == [0, 0]
