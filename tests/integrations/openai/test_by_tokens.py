"""vLLM is asked by generated tokens: their log-probabilities are right where those of echoed prompts are not."""

from dataclasses import replace

import pytest
import torch
from support.fake_vllm import NAMES, client_of
from support.tiny import make_split

import bayeslora as bl
from bayeslora.errors import InputError
from bayeslora.integrations.openai.echo import Query
from bayeslora.integrations.openai.scoring import MAX_TOKENS_AT_ONCE, reads
from bayeslora.tasks.types import Format

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def here(stand, split):
    return bl.predict(stand.model, stand.posterior, split, len(NAMES), tokenizer=stand.tokenizer).log_probs


def split_of(readout="likelihood", rows=3, **form):
    return make_split("test", rows, 2, classes=False, readout=readout, **form)


def test_letters_take_one_request_a_row_and_draw(stand):
    split = split_of("letters")
    torch.testing.assert_close(client_of(stand).predict(split).log_probs, here(stand, split), **CLOSE)
    assert len(stand.asked) == len(NAMES) * len(split)
    letters = {tuple(body["logprob_token_ids"]) for body in stand.asked}
    wanted = [tuple(stand.tokenizer.convert_tokens_to_ids(f" {letter}") for letter in "ABCD"[:n]) for n in (3, 4)]
    assert letters <= set(wanted)  # as they follow the prompt
    assert all(body["max_tokens"] == 1 and not body.get("echo") for body in stand.asked)


@pytest.mark.parametrize("normalisation", ["sum", "tokens", "unconditional"])
def test_choices_of_several_tokens_are_scored_token_by_token(stand, normalisation):
    split = split_of(normalisation=normalisation)
    torch.testing.assert_close(client_of(stand).predict(split).log_probs, here(stand, split), **CLOSE)
    assert not any(body.get("echo") for body in stand.asked)


def test_texts_after_a_prompt_are_scored_too(stand):
    prompt, texts = "Question: bag holds 3 red", [", 5 blue", " green"]
    echoing = stand.client(tokenizer=stand.tokenizer, echo=True).log_likelihoods(prompt, texts)
    torch.testing.assert_close(client_of(stand).log_likelihoods(prompt, texts), echoing, **CLOSE)


def test_choices_share_the_requests_of_what_they_begin_with():
    query = Query("row 0", (1, 2), ((5, 6, 7), (5, 6, 8), (5, 9)))
    assert reads(query) == [((), (5,)), ((5,), (6, 9)), ((5, 6), (7, 8))]
    many = Query("row 0", (1,), tuple((k,) for k in range(MAX_TOKENS_AT_ONCE + 2)))
    assert [len(tokens) for _, tokens in reads(many)] == [MAX_TOKENS_AT_ONCE, 2]


def test_vllm_is_sent_one_echo_after_another(stand):
    split, stand.wait = split_of(rows=2), 0.001
    torch.testing.assert_close(client_of(stand, echo=True).predict(split).log_probs, here(stand, split), **CLOSE)
    assert {len(body["prompt"]) for body in stand.asked} == {1}
    assert stand.busiest == 1


def test_the_tokenizer_is_that_of_the_base_that_the_server_names(stand, tmp_path):
    stand.tokenizer.save_pretrained(tmp_path)
    stand.places = {"base": str(tmp_path)}
    split = split_of("letters")
    torch.testing.assert_close(stand.client().predict(split).log_probs, here(stand, split), **CLOSE)
    stand.places = {"base": str(tmp_path / "elsewhere")}
    with pytest.raises(InputError, match=r"elsewhere', whose tokenizer is not to be had here; pass it, tokenizer=…"):
        stand.client().predict(split)


def test_a_server_that_truncates_log_probabilities_is_refused(stand):
    stand.shown = 2
    with pytest.raises(InputError, match=r"truncates log-probabilities: it gives 2 of the [34] that were asked for"):
        client_of(stand).predict(split_of("letters"))
    other = replace(stand, software="other")
    with pytest.raises(InputError, match="truncates log-probabilities: it gives 0 of"):
        client_of(other, echo=False).predict(split_of("letters"))


def test_adapters_that_change_between_requests_are_refused(stand):
    client = client_of(stand)
    client.predict(split_of(rows=1))
    stand.places = {"draw-001": "/another/folder"}
    with pytest.raises(InputError, match=r"changed its adapters between requests \(draw-001\)"):
        client.predict(split_of(rows=1))
    replace(client).predict(split_of(rows=1))  # a client anew takes them as they are


def test_adapters_that_do_nothing_are_refused_at_the_first_prediction(stand):
    assert client_of(stand, check=True).predict(split_of(rows=1)).draws == len(NAMES)
    stand.posterior = replace(stand.posterior, mean=stand.base, variance=stand.base)
    with pytest.raises(InputError, match="answers under 'draw-000' as its base model does, bit for bit"):
        client_of(stand, check=True).predict(split_of(rows=1))
    assert client_of(stand).predict(replace(split_of(rows=1), format=Format("", "letters"))).disagreement.max() == 0
