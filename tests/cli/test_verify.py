"""``verify``: a server of exported draws against the run that they came from."""

import pytest
from support.fake_vllm import Stand, listening

from bayeslora.models import adapter_of, load_model
from bayeslora.posteriors.loading import load_posterior


@pytest.fixture(scope="module")
def address(home, swag_run):
    posterior = load_posterior(swag_run / "posterior")
    adapter = adapter_of(posterior.origin.adapter_config, posterior.mean)
    model, tokenizer = load_model(str(home.path / "llama"), None, adapter=adapter)
    with listening(Stand(model, posterior, tokenizer, software="vllm")) as url:
        yield url


def test_a_server_of_the_run_agrees(bay, swag_run, address, home):
    said = bay("verify", swag_run, "--server", address, "--rows", "2")
    assert said.status == 0, said.err
    assert said.out.count("agrees") == 8
    said = bay("verify", swag_run, "--server", address, "--rows", "2", "--input", home.path / "other.jsonl", "--echo")
    assert said.status == 0, said.err
    assert said.out.count("agrees") == 4
    assert "likelihood, 2 rows" in said.out


def test_a_server_of_other_draws_is_refused_with_the_figures(bay, swag_run, address):
    said = bay("verify", swag_run, "--server", address, "--rows", "4", "--temperature", "400")
    assert said.status == 2, said.out
    assert "adapters of the server http://127.0.0.1:" in said.err
    assert said.out.count("differs") >= 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "name the server: --server"),
        (["--server", "http://127.0.0.1:9"], "cannot be reached"),
        (
            ["--server", "ADDRESS", "--names", "draw-007"],
            "has no adapter 'draw-007'; it has draw-000",
        ),
        (["--server", "ADDRESS", "--input", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_compared_is_said(refused, swag_run, address, words, told):
    assert told in refused("verify", swag_run, *(address if word == "ADDRESS" else word for word in words))
