"""Every method learns on a GPU, or on two that share the layers, what it learns on the CPU.

The GPUs are pretended, see `support.pretended`.
"""

from contextlib import nullcontext

import pytest
import torch
from support.methods_table import DROPOUT, LEARNERS, LM, TABLE
from support.pretended import FIRST, SECOND, dispatched, pretended, put
from support.tiny import KINDS, arguments, same_params
from torch import nn

from bayeslora.methods import Ensemble
from bayeslora.methods.ivon.optimizer import IvonOptimizer
from bayeslora.prediction import predict
from bayeslora.training.run import fit


def same(one, other):
    return same_params(one.mean, other.mean) and same_params(one.draw(1), other.draw(1))


@pytest.mark.parametrize("name", [row.param() for row in TABLE.values()])
def test_a_method_learns_on_a_gpu_what_it_learns_on_the_cpu(name, learn, tokenizer, tmp_path):
    wanted = learn(name, TABLE[name].kinds[0])
    model, task = wanted.kind.build(lora_dropout=DROPOUT), wanted.kind.task()
    with pretended(model):
        posterior = fit(model, task, wanted.method, arguments(tmp_path / "run"), tokenizer=tokenizer)
        found = predict(model, posterior, task.test, 2, tokenizer=tokenizer)
    assert same(posterior, wanted.posterior)
    assert found.log_probs.shape[1] == len(task.test)
    assert not found.log_probs.isnan().any()


@pytest.mark.parametrize("name", [row.param() for row in LEARNERS if LM in row.kinds])
def test_a_method_learns_on_two_gpus_what_it_learns_on_the_cpu(name, learn, tokenizer, tmp_path):
    wanted = learn(name, LM)
    model, task = wanted.kind.build(lora_dropout=DROPOUT), wanted.kind.task()
    with dispatched(model):
        posterior = fit(model, task, wanted.method, arguments(tmp_path / "run"), tokenizer=tokenizer)
    assert same(posterior, wanted.posterior)


@pytest.mark.parametrize("place", [pretended, dispatched])
def test_members_that_share_passes_learn_on_gpus_what_they_learn_on_the_cpu(place, tokenizer, tmp_path):
    def trained(folder, around):
        model, task = KINDS[LM].build(), KINDS[LM].task()
        with around(model):
            method = Ensemble(2, together=True)
            return fit(model, task, method, arguments(tmp_path / folder, max_steps=3), tokenizer=tokenizer)

    assert same(trained("gpu", place), trained("cpu", nullcontext))


@pytest.mark.parametrize("prior", ["fixed", "empirical"])
def test_ivon_takes_several_draws_a_step_over_two_gpus(prior):
    def trained(*places):
        params = [put(nn.Parameter(torch.full((3,), 1.0 + k)), where) for k, where in enumerate(places)]
        optimizer = IvonOptimizer(params, lr=0.1, ess=100.0, prior=prior, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(2):
                with optimizer.sampled():
                    sum((p**2).sum().to(places[0]) for p in params).backward()
            optimizer.step()
        return [p.detach().cpu() for p in params]

    wanted = trained("cpu", "cpu")
    with pretended(nn.Identity()):
        found = trained(FIRST, SECOND)
    assert all(map(torch.equal, found, wanted))
