"""Adapters on a server: what the client averages is what the draws say in plain passes here.

The server is a stand-in with vLLM's answers: an app that holds draws of a tiny model's posterior under names.
"""

import asyncio
import math
from dataclasses import replace

import httpx
import pytest
import torch
from fastapi import FastAPI
from support.fake_vllm import NAMES, Stand, listening
from support.tiny import gaussian, make_model, make_split, make_tokenizer, same_params

import bayeslora as bl
from bayeslora.errors import InputError
from bayeslora.integrations.openai.client import Adapters
from bayeslora.integrations.openai.echo import Query, choices_of, echoed_log_likelihoods
from bayeslora.params import read
from bayeslora.tasks.types import Format

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def stand():
    model = make_model("llama")
    return Stand(model, gaussian(model), make_tokenizer())


def split_of(readout="likelihood", *, classes=False, rows=5):
    return make_split("test", rows, 2, classes=classes, readout=readout)


def here(stand, split):
    return bl.predict(stand.model, stand.posterior, split, len(NAMES), tokenizer=stand.tokenizer)


@pytest.mark.parametrize("sent", ["texts", "tokens"])
@pytest.mark.parametrize(
    ("readout", "classes"), [("likelihood", False), ("letters", False), ("auto", False), ("auto", True)]
)
def test_the_prediction_is_that_of_the_same_draws_here(stand, sent, readout, classes):
    split = split_of(readout, classes=classes)
    before = read(stand.model)
    found = stand.client(tokenizer=stand.tokenizer if sent == "tokens" else None).predict(split)
    wanted = here(stand, split)
    assert found.readout == wanted.readout
    assert found.log_probs.shape == wanted.log_probs.shape
    torch.testing.assert_close(found.log_probs, wanted.log_probs, **CLOSE)
    torch.testing.assert_close(found.mutual_information, wanted.mutual_information, **CLOSE)
    assert float(found.log_probs.std(0).nan_to_num(0).max()) > 1e-3  # the draws do differ
    assert same_params(read(stand.model), before)
    assert isinstance(stand.asked[0]["prompt"][0], str) == (sent == "texts")
    table = bl.evaluate(found, split, resamples=0).table()
    assert table.count("accuracy") == bl.evaluate(wanted, split, resamples=0).table().count("accuracy")


@pytest.mark.parametrize("sent", ["texts", "tokens"])
@pytest.mark.parametrize("normalisation", ["characters", "tokens", "unconditional"])
def test_normalised_scores_are_those_here(stand, sent, normalisation):
    split = replace(split_of(), format=Format("", "likelihood", normalisation=normalisation))
    client = stand.client(tokenizer=stand.tokenizer if sent == "tokens" else None)
    if (sent, normalisation) == ("texts", "tokens"):
        with pytest.raises(InputError, match=r"counts tokens.*pass the base's tokenizer="):
            client.predict(split)
        return
    torch.testing.assert_close(client.predict(split).log_probs, here(stand, split).log_probs, **CLOSE)
    if normalisation == "unconditional":  # once for each different choice and draw, beside one request a choice
        each = [choice for example in split for choice in example.choices]
        assert len(stand.asked) == len(NAMES) * (len(each) + len(set(each)))


@pytest.mark.parametrize("opening", ["<s>", "<|begin_of_text|>"])
def test_a_token_that_opens_texts_does_not_move_the_choices(stand, opening):
    stand.opening = opening
    torch.testing.assert_close(stand.client().predict(split_of()).log_probs, here(stand, split_of()).log_probs, **CLOSE)


@pytest.mark.parametrize("sent", ["texts", "tokens"])
def test_a_server_that_must_write_a_token_is_asked_for_one(stand, sent):
    stand.least = 1
    found = stand.client(tokenizer=stand.tokenizer if sent == "tokens" else None, concurrency=1).predict(split_of())
    torch.testing.assert_close(found.log_probs, here(stand, split_of()).log_probs, **CLOSE)
    assert [body["max_tokens"] for body in stand.asked].count(0) == 1


def test_prompts_are_cut_as_they_are_here(stand):
    split = replace(split_of(), format=Format("", "likelihood", max_length=9))
    found = stand.client(tokenizer=stand.tokenizer).predict(split)
    assert found.truncated == len(split)
    torch.testing.assert_close(found.log_probs, here(stand, split).log_probs, **CLOSE)
    with pytest.raises(InputError, match="pass the base's tokenizer="):
        stand.client().predict(split)


def test_the_adapters_are_found_and_the_base_is_not_among_them(stand):
    client = stand.client(names=())
    assert client.served() == NAMES
    assert client.predict(split_of(rows=2)).draws == len(NAMES)
    stand.parents = False
    with pytest.raises(InputError, match=r"none of its models an adapter \(base, draw-000.*names="):
        replace(client).predict(split_of(rows=2))


@pytest.mark.parametrize("sent", ["texts", "tokens"])
def test_texts_are_scored_by_the_mean_of_their_likelihoods(stand, sent):
    prompt, texts = "Question: bag holds 3 red", [", 5 blue", " green", "."]
    client = stand.client(tokenizer=stand.tokenizer if sent == "tokens" else None)
    ids = stand.tokenizer(prompt)["input_ids"]
    wanted = torch.zeros(len(NAMES), len(texts))
    for k, name in enumerate(NAMES):
        for n, text in enumerate(texts):
            tail = stand.tokenizer(text)["input_ids"]
            log_p = stand.log_probs(name, ids + tail)
            wanted[k, n] = sum(float(log_p[len(ids) - 1 + t, token]) for t, token in enumerate(tail))
    torch.testing.assert_close(client.log_likelihoods(prompt, texts), wanted, **CLOSE)
    torch.testing.assert_close(client.score(prompt, texts), wanted.exp().mean(0).log(), **CLOSE)


def test_one_answer_of_each_draw_is_what_the_draws_generate_here(stand):
    stand.model.get_base_model().generation_config.eos_token_id = None
    prompts = ["Question: bag holds 3 red, 5 blue", "Answer"]
    wanted = bl.generate_each(
        stand.model, stand.posterior, prompts, len(NAMES), tokenizer=stand.tokenizer, max_new_tokens=4
    )
    found = stand.client().generate_each(prompts, max_tokens=4, temperature=0)
    for mine, theirs in zip(found, wanted, strict=True):
        assert [a.tokens for a in mine.answers] == [a.tokens for a in theirs.answers]
        assert (mine.draws, mine.groups) == (theirs.draws, theirs.groups)
        assert mine.semantic_entropy == pytest.approx(theirs.semantic_entropy)
        assert mine.predictive_entropy == pytest.approx(theirs.predictive_entropy, abs=1e-3)
        assert mine.answers[0].alternatives[0][0][1] == pytest.approx(math.exp(mine.answers[0].log_probs[0]))
        assert mine.answers[0].token_ids == (-1,) * 4
        assert mine.answers[0].finished == "length"
        assert bool(mine.answers[0].entropy.isnan().all())


def test_several_answers_of_a_draw_have_seeds_of_their_own(stand):
    found = stand.client().generate_each(["Answer"], max_tokens=3, n=2, seed=7, same=lambda a, b: True, top_p=0.9)[0]
    assert found.draws == (0, 0, 1, 1, 2, 2)
    assert found.semantic_entropy == 0
    assert sorted(body["seed"] for body in stand.asked) == [7, 8, 9]
    assert stand.asked[0]["top_p"] == 0.9


def test_requests_are_sent_again_after_503_and_429(stand):
    stand.faults = [503, 429, 502, 503]
    found = stand.client(names=(), retries=4).predict(split_of())
    torch.testing.assert_close(found.log_probs, here(stand, split_of()).log_probs, **CLOSE)
    assert not stand.faults


def test_waits_between_tries_double(stand, monkeypatch):
    waits = []
    sleep = asyncio.sleep

    async def note(seconds):
        waits.append(seconds)
        await sleep(0)

    stand.faults = [503] * 3
    monkeypatch.setattr("bayeslora.integrations.openai.session.asyncio.sleep", note)
    stand.client(names=(), backoff=0.5).served()
    assert [wait for wait in waits if wait] == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("bound", [1, 3])
def test_no_more_requests_are_under_way_than_allowed(stand, bound):
    stand.wait = 0.01
    stand.client(concurrency=bound).predict(split_of())
    assert stand.busiest == bound


@pytest.mark.slow
def test_it_works_over_the_network_and_where_a_loop_runs_already(stand):
    wanted = here(stand, split_of()).log_probs

    async def notebook(client):
        return client.predict(split_of())

    stand.key = "secret"
    with listening(stand) as url:
        client = Adapters(f"{url}/v1/", api_key="secret")
        torch.testing.assert_close(client.predict(split_of()).log_probs, wanted, **CLOSE)
        torch.testing.assert_close(asyncio.run(notebook(client)).log_probs, wanted, **CLOSE)
        assert "secret" not in repr(client)
        stand.wait = 0.5
        with pytest.raises(InputError, match=r"did not answer within 0.05 s, 2 times; raise timeout"):
            replace(client, timeout=0.05, retries=1, backoff=0).predict(split_of(rows=1))
    with pytest.raises(InputError, match="cannot be reached"):
        replace(client, retries=1, backoff=0).predict(split_of())


def one_sentence(work):
    with pytest.raises(InputError) as caught:
        work()
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 400
    return said


def test_faults_of_the_server_are_said_in_one_sentence(stand):
    split = split_of(rows=2)
    said = one_sentence(lambda: stand.client(names=["draw-000", "draw-009"]).predict(split))
    assert "no adapter 'draw-009'; it has draw-000, draw-001, draw-002" in said
    stand.faults = [503] * 99
    assert "answers 503 again and again (3 tries)" in one_sentence(lambda: stand.client(retries=2).predict(split))
    stand.faults = [500]
    assert "refuses /v1/models (500): not now" in one_sentence(stand.client(names=()).served)
    stand.faults, stand.key = [], "secret"
    assert "refuses the API key (401)" in one_sentence(lambda: stand.client().predict(split))
    assert "secret" not in one_sentence(lambda: stand.client(api_key="wrong").predict(split))


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("sent", ["texts", "tokens"])
def test_a_server_that_does_not_echo_is_told_from_one_that_does(stand, sent, least):
    stand.echoes, stand.least = False, least
    client = stand.client(tokenizer=stand.tokenizer if sent == "tokens" else None)
    assert "log-probabilities" in one_sentence(lambda: client.predict(split_of(rows=2)))


def test_another_kind_of_server_is_refused():
    app = FastAPI()
    app.get("/v1/models")(lambda: ["a list"])
    client = Adapters("http://other", transport=httpx.ASGITransport(app))
    assert "does not answer /v1/models in JSON" in one_sentence(client.served)
    assert "(404): Not Found" in one_sentence(replace(client, url="http://other/else").served)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"url": "localhost:8000"}, "http://"),
        ({"names": "draw-000"}, "list"),
        ({"names": ["a", "a"]}, "different"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"retries": -1}, "retries"),
        ({"timeout": 0.0}, "timeout"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, told):
    assert told in one_sentence(lambda: Adapters(**({"url": "http://a"} | settings)))


def test_what_cannot_be_asked_is_refused(stand):
    client = stand.client()
    assert "has no examples" in one_sentence(lambda: client.predict(split_of(rows=0)))
    assert "classification head" in one_sentence(lambda: client.predict(split_of("head")))
    assert "none of them empty" in one_sentence(lambda: client.score("Answer", ["red", ""]))
    assert "'stream'" in one_sentence(lambda: client.generate_each(["Answer"], stream=True))
    assert "at least 1" in one_sentence(lambda: client.generate_each(["Answer"], n=0))
    words = stand.client(tokenizer=stand.tokenizer)
    assert "become one token" in one_sentence(lambda: words.score("bag hol", ["ds"]))
    assert not stand.asked


def test_an_echo_with_fewer_log_probabilities_than_tokens_is_refused():
    choice = {"logprobs": {"tokens": ["a", "b"], "token_logprobs": [None]}}
    with pytest.raises(InputError, match="truncates log-probabilities: it gives 1 for 2 tokens"):
        choices_of({"choices": [choice]}, 1)


def echo(*tokens):
    values = [None, *(-1.0 for _ in tokens[1:])]
    return [{"text": "Answer: red", "logprobs": {"tokens": list(tokens), "token_logprobs": values}}]


def test_the_choice_is_found_by_the_text_of_its_tokens():
    row = Query("row 0", "Answer:", (" red",))
    assert echoed_log_likelihoods(row, echo("Answer", ":", " red"), 0) == [-1.0]
    assert echoed_log_likelihoods(row, echo("<s>", "Answer", ":", " r", "ed"), 0) == [-2.0]
    assert echoed_log_likelihoods(row, echo("Ans�", "�:", " red", "."), 1) == [
        -1.0
    ]  # letters of several tokens before it
    assert echoed_log_likelihoods(row, echo("<s>", "Answer:", " ", "�", "�"), 0) == [-3.0]  # and in it
    assert echoed_log_likelihoods(row, echo("<s>", "Answer:", "red"), 0) == [
        -1.0
    ]  # a token that is shown without its space
    for tokens in (("Answer", ": red"), ("<s>", "An", "swe", ":", "red"), ("Ans�", "�:", " �", "�")):
        with pytest.raises(InputError, match=r"row 0: the tokens do not tell where ' red' begins; .*tokenizer="):
            echoed_log_likelihoods(row, echo(*tokens), 0)


def test_the_servers_base_model_is_asked_beside_its_adapters(stand):
    split = split_of()
    found = stand.client().predict(split, base=True)
    wanted = bl.predict(stand.model, stand.posterior, split, len(NAMES), base=True, tokenizer=stand.tokenizer)
    torch.testing.assert_close(found.base_log_probs, wanted.base_log_probs, **CLOSE)
    torch.testing.assert_close(found.log_probs, wanted.log_probs, **CLOSE)
    assert stand.client().predict(split).base_log_probs is None
    stand.parents = False
    with pytest.raises(InputError, match="does not say which model is its adapters' base; leave base=True out"):
        stand.client().predict(split, base=True)
