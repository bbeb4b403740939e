"""The server, asked by OpenAI's own client and by hand."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from support.serving import running, served
from support.tiny import gaussian, make_model

import bayeslora as bl
from bayeslora.integrations.server import Limits, Served
from bayeslora.integrations.server.worker import Call
from bayeslora.params import swapped
from bayeslora.tasks.types import Example, Format, Split

PROMPT = "Question: bag holds 3 red, 5 blue"
CHAT = [{"role": "user", "content": "bag holds 3 red"}]


def own(tokenizer, prompt, draws=3, **how):
    model = make_model("llama")
    return bl.generate(
        model, gaussian(model), [prompt], draws, tokenizer=tokenizer, eos_token_id=None, **{"max_new_tokens": 6, **how}
    )[0]


def test_models(client):
    names = [m.id for m in client.models.list()]
    assert names == ["tiny", "tiny/mean", "tiny/draw-000", "tiny/draw-001", "tiny/draw-002", "tiny/draw-003"]
    assert client.models.retrieve("tiny/draw-001").id == "tiny/draw-001"


def test_a_completion_is_that_of_the_library(client, tokenizer):
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=2)
    wanted = own(tokenizer, PROMPT)
    choice = found.choices[0]
    assert choice.text == wanted.text
    assert choice.finish_reason == "length"
    assert choice.logprobs.tokens == list(wanted.tokens)
    assert choice.logprobs.token_logprobs == pytest.approx(wanted.log_probs.tolist(), abs=1e-4)
    assert [len(top) for top in choice.logprobs.top_logprobs] == [2] * 6
    extra = choice.uncertainty
    assert [t["mutual_information"] for t in extra["tokens"]] == pytest.approx(
        wanted.mutual_information.tolist(), abs=1e-4
    )
    assert extra["log_mean_likelihood"] == pytest.approx(wanted.log_mean_likelihood, abs=1e-3)
    assert found.usage.completion_tokens == 6
    assert found.usage.prompt_tokens == len(tokenizer(PROMPT)["input_ids"])


def test_parts_of_the_posterior_are_models(client, tokenizer):
    model = make_model("llama")
    posterior = gaussian(model)
    for name, params in (("tiny/mean", posterior.mean), ("tiny/draw-002", posterior.draw(2))):
        found = client.completions.create(model=name, prompt=PROMPT, max_tokens=6, temperature=0).choices[0]
        alone = bl.generate(
            model, bl.Point(params), [PROMPT], tokenizer=tokenizer, max_new_tokens=6, eos_token_id=None
        )[0]
        assert found.text == alone.text
        assert found.uncertainty["draws"] == 1
        assert found.uncertainty["max_mutual_information"] == 0


def test_no_draws_are_the_mean(client, address):
    how = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    zero = client.completions.create(model="tiny", extra_body={"draws": 0}, **how).choices[0]
    mean = client.completions.create(model="tiny/mean", **how).choices[0]
    assert (zero.text, zero.uncertainty) == (mean.text, mean.uncertainty)
    body = {"input": "bag holds 3 red", "choices": ["red", "blue"]}
    answers = [
        httpx.post(f"{address}/v1/classify", json=body | {"model": name, "draws": draws}).json()
        for name, draws in (("tiny", 0), ("tiny/mean", 1))
    ]
    assert answers[0]["data"] == answers[1]["data"]
    assert answers[0]["draws"] == 1


def test_a_server_may_answer_by_the_mean_unless_asked_for_draws(tokenizer):
    with running(served(tokenizer, draws=0)) as (address, _):
        body = {"model": "tiny", "input": "bag", "choices": ["red", "blue"]}
        found = [
            httpx.post(f"{address}/v1/classify", json=body | more).json() for more in ({}, {"draws": 0}, {"draws": 3})
        ]
    assert found[0] == found[1]
    assert [answer["draws"] for answer in found] == [1, 1, 3]


def test_a_chat_and_its_stream_say_the_same(client, tokenizer):
    how = {"model": "tiny", "messages": CHAT, "max_tokens": 7, "temperature": 0, "logprobs": True}
    whole = client.chat.completions.create(top_logprobs=3, **how)
    assert (
        whole.choices[0].message.content == own(tokenizer, "Question: bag holds 3 red Answer:", max_new_tokens=7).text
    )
    assert len(whole.choices[0].logprobs.content) == 7
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 3
    stream = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **how)
    pieces = list(stream)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content for p in pieces if p.choices) == whole.choices[0].message.content
    assert pieces[-1].usage.completion_tokens == 7
    assert [p.choices[0].finish_reason for p in pieces if p.choices] == [None] * 7 + ["length"]
    assert pieces[1].choices[0].uncertainty["alternatives"][0]["token"]


def test_streamed_completions_end_at_a_stop_string(client, tokenizer):
    whole = own(tokenizer, PROMPT)
    stop = whole.tokens[3].strip() or whole.tokens[3]
    how = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "stop": [stop, "zzz"]}
    once = client.completions.create(**how).choices[0]
    assert once.text == whole.text.split(stop)[0]
    assert once.finish_reason == "stop"
    pieces = list(client.completions.create(stream=True, **how))
    assert "".join(p.choices[0].text for p in pieces) == once.text


def test_a_seed_gives_the_same_text_in_any_company(client):
    def sampled(seed):
        found = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=6, temperature=1.5, top_p=0.9, seed=seed, n=2
        )
        return [c.text for c in found.choices]

    alone = [sampled(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(sampled, range(4)))
    assert together == alone
    assert alone[0] != alone[1]
    assert alone[0][0] != alone[0][1]


def test_echo_scores_a_prompt(client, tokenizer):
    found = client.completions.create(
        model="tiny/draw-001", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1
    ).choices[0]
    model = make_model("llama")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with swapped(model, gaussian(model).draw(1)), torch.no_grad():
        log_p = model.eval()(input_ids=ids).logits[0, :-1].log_softmax(-1)
    assert found.text == PROMPT
    assert found.logprobs.token_logprobs[0] is None
    assert found.logprobs.token_logprobs[1:] == pytest.approx(
        log_p.gather(1, ids[0, 1:, None])[:, 0].tolist(), abs=1e-4
    )
    offsets = found.logprobs.text_offset
    assert [PROMPT[a:b] for a, b in zip(offsets, [*offsets[1:], None], strict=True)] == [
        tokenizer.convert_ids_to_tokens(i) for i in ids[0].tolist()
    ]


def test_classification_is_prediction(address, tokenizer):
    choices, text = ["red", "blue", "dark green"], "bag holds 3 red, 5 blue."
    body = {"model": "tiny", "input": [text, "bag"], "choices": choices, "draws": 4}
    found = httpx.post(f"{address}/v1/classify", json=body).json()
    model = make_model("llama")
    split = Split("x", (Example(text, tuple(choices)), Example("bag", tuple(choices))), Format("", "likelihood"))
    wanted = bl.predict(model, gaussian(model), split, 4, tokenizer=tokenizer)
    assert [list(d["probs"].values()) for d in found["data"]] == [
        pytest.approx(p, abs=1e-4) for p in wanted.probs.tolist()
    ]
    assert found["data"][0]["mutual_information"] == pytest.approx(float(wanted.mutual_information[0]), abs=1e-4)


@pytest.mark.slow
def test_requests_that_come_together_share_a_batch(tokenizer):
    with running(served(tokenizer)) as (address, worker):

        def one(k):
            body = {"model": "tiny", "prompt": f"bag holds {k}", "max_tokens": 40, "temperature": 0}
            return httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]

        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(one, range(8)))
        assert max(worker.batches) > 1
        assert texts == [one(k) for k in range(8)]


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("completions", {"model": "tiny"}, 400, "prompt"),
        ("completions", {"model": "other", "prompt": "x"}, 404, "no model 'other'"),
        ("completions", {"model": "tiny", "prompt": "red " * 200}, 400, "more than the model's"),
        ("completions", {"model": "tiny", "prompt": [3] * 200}, 400, "more than the model's"),
        ("completions", {"model": "tiny", "prompt": ""}, 400, "empty"),
        ("completions", {"model": "tiny", "prompt": []}, 400, "empty"),
        ("completions", {"model": "tiny", "prompt": [9999]}, 400, "from 0 to"),
        ("completions", {"model": "tiny", "prompt": "x", "draws": 5}, 400, "at most 4"),
        ("completions", {"model": "tiny", "prompt": "x", "draws": -1}, 400, "draws"),
        ("completions", {"model": "tiny", "prompt": "x", "max_tokens": 5000}, 400, "more than this server's"),
        ("completions", {"model": "tiny", "prompt": "x", "n": 100}, 400, "at once"),
        ("completions", {"model": "tiny", "prompt": "x", "temperature": -1}, 400, "temperature"),
        ("completions", {"model": "tiny", "prompt": "x", "suffix": "y"}, 400, "suffix is not supported"),
        ("completions", {"model": "tiny", "prompt": "x", "echo": True, "stream": True}, 400, "echo"),
        ("chat/completions", {"model": "tiny", "messages": []}, 400, "messages"),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "king", "content": "x"}]}, 400, "role"),
        ("chat/completions", {"model": "tiny", "messages": CHAT, "tools": [{}]}, 400, "tools is not supported"),
        ("chat/completions", {"model": "tiny", "messages": CHAT, "logit_bias": {"3": 1}}, 400, "logit_bias"),
        ("classify", {"model": "tiny", "input": "x", "choices": ["a"]}, 400, "two different"),
        ("classify", {"model": "tiny", "input": [], "choices": ["a", "b"]}, 400, "input is empty"),
        ("nothing", {}, 404, "Not Found"),
    ],
)  # fmt: skip
def test_bad_requests_get_openais_error(path, body, status, said, address):
    found = httpx.post(f"{address}/v1/{path}", json=body)
    assert found.status_code == status
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"]


def test_bodies_that_are_no_json_or_too_large(address):
    found = httpx.post(f"{address}/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert (found.status_code, found.json()["error"]["type"]) == (400, "invalid_request_error")
    large = b'{"model": "' + b"x" * 2**20 + b'"}'
    assert httpx.post(f"{address}/v1/completions", content=large).status_code == 413

    def parts():
        for _ in range(20):
            yield b"x" * 2**17

    assert httpx.post(f"{address}/v1/completions", content=parts()).status_code == 413


def test_a_key(tokenizer):
    with running(served(tokenizer), Limits(api_key="secret")) as (address, _):
        assert httpx.get(f"{address}/").status_code == 200
        assert httpx.get(f"{address}/v1/models").status_code == 401
        with pytest.raises(openai.AuthenticationError, match="API key is missing"):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()
        assert openai.OpenAI(base_url=f"{address}/v1", api_key="secret").models.list().data


def test_a_full_queue_and_a_late_answer(tokenizer):
    with running(served(tokenizer), Limits(waiting=1, rows=1, timeout=0.4)) as (address, worker):
        begun, go = threading.Event(), threading.Event()

        def hold():
            begun.set()
            go.wait(20)

        worker.submit(Call([hold]))
        begun.wait(20)
        body = {"model": "tiny", "prompt": "bag", "max_tokens": 3}
        with ThreadPoolExecutor(2) as pool:
            waits = pool.submit(lambda: httpx.post(f"{address}/v1/completions", json=body, timeout=60))
            while not worker.queue:
                time.sleep(0.01)
            full = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
            assert (full.status_code, full.headers["retry-after"]) == (429, "1")
            assert full.json()["error"]["code"] == "server_busy"
            assert waits.result().status_code == 504
            go.set()
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_a_client_that_goes_away_ends_its_row(tokenizer):
    with running(served(tokenizer)) as (address, worker):
        body = {"model": "tiny", "prompt": "bag", "max_tokens": 110, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as found:
            next(found.iter_lines())
        after = {"model": "tiny", "prompt": "bag", "max_tokens": 2, "temperature": 0}
        assert httpx.post(f"{address}/v1/completions", json=after, timeout=60).status_code == 200
        assert worker.thread.is_alive()


def test_an_encoder_only_classifies(tokenizer):
    model = make_model("bert")
    like = Split("input", (), Format("", "head", (), None, "class"), ("red", "blue", "green"))
    what = Served("bert", model, tokenizer, gaussian(model), 3, 4, like)
    with running(what) as (address, _):
        body = {"model": "bert", "prompt": "x"}
        assert "use /v1/classify" in httpx.post(f"{address}/v1/completions", json=body).json()["error"]["message"]
        found = httpx.post(f"{address}/v1/classify", json={"model": "bert", "input": "bag holds 3 red"}).json()
        assert sum(found["data"][0]["probs"].values()) == pytest.approx(1, abs=1e-4)
        wrong = httpx.post(f"{address}/v1/classify", json={"model": "bert", "input": "x", "choices": ["a", "b"]})
        assert wrong.status_code == 400


def test_rows_of_columns_fill_the_template_and_lacking_ones_are_refused(tokenizer):
    choices = ["red", "blue"]
    form = Format("bag holds {first} red, {second} blue. {text} Answer:", "likelihood", normalisation="tokens")
    what = served(tokenizer, like=Split("input", (), form), text_column="asked")
    rows = [{"first": 3, "second": "5", "asked": "Question"}, {"first": 1, "second": 2, "text": "Answer", "id": 4}]
    with running(what) as (address, _):

        def ask(given):
            return httpx.post(
                f"{address}/v1/classify", json={"model": "tiny", "input": given, "choices": choices}, timeout=60
            )

        found = ask(rows).json()["data"]
        alone = ask(rows[0]).json()["data"]
        lacking = ask([rows[0], {"first": 1, "text": "x"}])
        plain = ask("bag")
    model = make_model("llama")
    examples = (
        Example("Question", tuple(choices), columns=(("first", "3"), ("second", "5"))),
        Example("Answer", tuple(choices), columns=(("first", "1"), ("second", "2"))),
    )
    wanted = bl.predict(model, gaussian(model), Split("x", examples, form), 3, tokenizer=tokenizer)
    assert [list(d["probs"].values()) for d in found] == [pytest.approx(p, abs=1e-4) for p in wanted.probs.tolist()]
    assert list(alone[0]["probs"].values()) == pytest.approx(wanted.probs[0].tolist(), abs=1e-4)
    assert (lacking.status_code, plain.status_code) == (400, 400)
    assert "has no column 'second', which the template names: its columns are first, text" in lacking.text
    assert "input 0 is a text, and this model's template names the columns first, second" in plain.text
