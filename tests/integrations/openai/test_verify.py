"""A server is compared with the posterior here: which adapters differ, and by how much more than rounding."""

import copy
from dataclasses import replace

import pytest
import torch
from support.fake_vllm import NAMES, client_of
from support.serving import DRAWN, running, served
from support.tiny import gaussian, make_model, make_split, same_state, state_of

from bayeslora.errors import InputError
from bayeslora.integrations.openai.client import Adapters, Reference
from bayeslora.posteriors import Draws, Mixture, Point

SPLIT = make_split("test", 4, 2, classes=False, readout="likelihood")


def test_draws_that_are_served_as_they_are_agree(stand):
    local = copy.deepcopy(stand.model)
    before = state_of(local)
    (found,) = client_of(stand).verify(local, stand.posterior, split=SPLIT)
    assert found.names == ("base", *NAMES)
    assert not found.differing
    assert float(found.differences.max()) < 1e-4
    assert 1e-4 < float(found.rounding.min()) <= float(found.rounding.max()) < 0.2
    found.check("the server")
    assert found.table().count("agrees") == 4
    assert same_state(local, before)


def test_without_rows_of_ones_own_both_readouts_are_compared(stand):
    found = client_of(stand).verify(stand.model, stand.posterior, rows=2)
    assert [(each.readout, each.rows, each.differing) for each in found] == [("letters", 2, ()), ("likelihood", 2, ())]


def test_the_estimate_of_rounding_is_what_bf16_does(stand):
    (found,) = client_of(stand).verify(stand.model, stand.posterior, split=SPLIT)
    local = copy.deepcopy(stand.model)
    stand.model = stand.model.to(torch.bfloat16)
    (rounded,) = client_of(stand).verify(local, stand.posterior, split=SPLIT)
    assert not rounded.differing
    ratio = rounded.differences / found.rounding
    assert 0.2 < float(ratio.min()) <= float(ratio.max()) < 3


def test_an_adapter_of_another_draw_is_named(stand):
    draws = [stand.posterior.draw(k) for k in range(3)]
    draws[2] = {name: 1.5 * value for name, value in draws[2].items()}
    posterior = Mixture(tuple(Point(p, stand.posterior.origin) for p in draws), stand.posterior.origin)
    (found,) = client_of(stand).verify(stand.model, posterior, split=SPLIT)
    assert found.differing == ("draw-002",)
    with pytest.raises(
        InputError, match=r"1 of 3 adapters of the server differ .*\(draw-002\): draw-002 by 0\.\d+ nats"
    ):
        found.check("the server")
    (alone,) = client_of(stand, names=["draw-001"]).verify(stand.model, posterior, split=SPLIT)
    assert not alone.differing  # the number in its name counts, not its place


def test_another_base_model_is_told_from_another_adapter(stand):
    local = copy.deepcopy(stand.model)
    with torch.no_grad():
        stand.model.get_base_model().lm_head.weight.mul_(1.5)
    (found,) = client_of(stand).verify(local, stand.posterior, split=SPLIT)
    with pytest.raises(InputError, match=r"has another base model \(base\): its log-probabilities are 0\.\d+ nats"):
        found.check("the server")


def test_more_adapters_than_draws_are_refused(stand):
    point = Point(stand.posterior.mean, stand.posterior.origin)
    with pytest.raises(InputError, match="an adapter 'draw-001', and the posterior has 1 different draws"):
        client_of(stand).verify(stand.model, point, split=SPLIT)
    assert not stand.asked


def test_the_first_prediction_is_verified_once_and_not_if_told_not_to(stand):
    reference = Reference(stand.model, stand.posterior)
    client = client_of(stand, reference=reference, check=True)
    client.predict(SPLIT.take([0]))
    first = len(stand.asked)
    client.predict(SPLIT.take([0]))
    assert first > len(stand.asked) - first
    wrong = replace(reference, draws=Draws(seed=1), posterior=replace(stand.posterior, mean=stand.base))
    with pytest.raises(InputError, match="3 of 3 adapters"):
        client_of(stand, reference=wrong, check=True).predict(SPLIT)
    assert client_of(stand, reference=wrong).predict(SPLIT).draws == 3


def test_a_server_that_does_not_serve_its_base_is_compared_too(tokenizer):
    model = make_model("llama")
    with running(served(tokenizer)) as (address, _):
        client = Adapters(address, names=DRAWN, tokenizer=tokenizer)
        (found,) = client.verify(model, gaussian(model), rows=2, split=SPLIT)
        (alone,) = replace(client, names=DRAWN[1:2]).verify(model, gaussian(model), rows=1, split=SPLIT)
    assert (found.names, found.base, found.differing) == (DRAWN, "", ())
    assert (alone.names, alone.differing) == (DRAWN[1:2], ())
