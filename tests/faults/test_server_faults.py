"""Requests of strangers: each bears alone what it asks for, and whatever it does, others are answered."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import httpx
import jinja2
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from peft import LoraConfig, get_peft_model
from support.serving import running, served
from transformers import BloomConfig, BloomForCausalLM

from bayeslora.integrations.server import Limits, classification, connections, echo
from bayeslora.integrations.server.responses import TextCompletion
from bayeslora.integrations.server.worker import Call

PROMPT = "Question: bag holds 3 red, 5 blue"
CHAT = [{"role": "user", "content": "bag"}]
SMALL = Limits(texts=3, choices=3, characters=50, context=64)
HALF = "\ud800"


@pytest.fixture(scope="module")
def address(tokenizer):
    with running(served(tokenizer), SMALL) as (found, _):
        yield found


def post(address, path, body, **how):
    content = json.dumps(body).encode()  # httpx refuses half letters
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{address}/v1/{path}", content=content, headers=headers, timeout=60, **how)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"model": HALF, "prompt": "bag"}),
        ("completions", {"model": "tiny", "prompt": f"bag {HALF}"}),
        ("completions", {"model": "tiny", "prompt": "bag", "stop": HALF}),
        ("completions", {"model": "tiny", "prompt": "bag", HALF: 1}),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": HALF}]}),
        ("chat/completions", {"model": "tiny", "messages": [{"role": HALF, "content": "x"}]}),
        ("classify", {"model": "tiny", "input": HALF, "choices": ["a", "b"]}),
        ("classify", {"model": "tiny", "input": {"text": HALF}, "choices": ["a", "b"]}),
        ("classify", {"model": "tiny", "input": "x", "choices": ["a", HALF]}),
        ("completions", {"model": "tiny", "prompt": "bag", "temperature": float("nan")}),
    ],
)
def test_half_letters_and_what_is_no_number_are_no_json(path, body, address):
    found = post(address, path, body)
    assert found.status_code == 400
    assert "the body is not JSON" in found.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("completions", {"prompt": "x" * 51}, "51 characters are more than this server's 50"),
        ("completions", {"prompt": [3] * 51}, "51 token ids are more"),
        ("completions", {"prompt": [3] * 49}, "49 tokens, and with 16 new ones more than the server's 64"),
        ("completions", {"prompt": "bag", "stop": ["a"] * 5}, "stop"),
        ("completions", {"prompt": "bag", "stop": "a" * 257}, "stop"),
        ("completions", {"prompt": "bag", "seed": 1.5}, "seed"),
        ("completions", {"prompt": "bag", "n": "2"}, "n: "),
        ("completions", {"prompt": "bag", "n": True}, "n: "),
        ("completions", {"prompt": ["bag"] * 17}, "17 answers at once are more"),
        ("completions", {"prompt": "bag", "best_of": 2}, "best_of is not supported"),
        ("chat/completions", {"messages": CHAT * 1025}, "messages"),
        ("chat/completions", {"messages": CHAT * 17}, "51 characters are more"),
        ("classify", {"input": ["bag"] * 4, "choices": ["a", "b"]}, "4 texts are more"),
        ("classify", {"input": "bag", "choices": ["a", "b", "c", "d"]}, "4 choices are more"),
        ("classify", {"input": "bag", "choices": ["a", "b" * 51]}, "51 characters of a choice are more"),
        ("classify", {"input": "bag", "choices": ["a", " "]}, "none of them blank"),
        ("classify", {"input": ["bag", "x" * 51], "choices": ["a", "b"]}, "input 1 has 51 characters"),
    ],
)
def test_what_a_request_may_ask_for_is_bounded(path, body, said, address):
    found = post(address, path, {"model": "tiny", **body})
    assert found.status_code == 400, found.text
    assert said in found.json()["error"]["message"]


def test_whole_numbers_may_have_a_point_and_unknown_fields_are_ignored(address):
    body = {
        "model": "tiny",
        "prompt": "bag",
        "n": 2.0,
        "max_tokens": 1.0,
        "seed": 10**30,
        "user": "me",
        "store": {"any": 1},
    }
    assert len(post(address, "completions", body).json()["choices"]) == 2


def test_a_column_without_a_name_is_not_the_text(address):
    body = {"model": "tiny", "input": {"": {"any": 1}, "text": "bag"}, "choices": ["a", "b"]}
    assert post(address, "classify", body).status_code == 200


def test_an_answer_whose_length_is_not_said_fits_the_server(tokenizer):
    with running(served(tokenizer), Limits(tokens=3)) as (address, _):
        found = post(address, "completions", {"model": "tiny", "prompt": "bag"}).json()
    assert found["usage"]["completion_tokens"] == 3


def test_messages_that_the_template_refuses(tokenizer):
    what = served(tokenizer)
    what.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with running(what) as (address, _):
        found = post(address, "chat/completions", {"model": "tiny", "messages": CHAT})
    assert found.status_code == 400, jinja2.TemplateError
    assert "chat template refuses the messages: roles must alternate" in found.json()["error"]["message"]


def test_an_echo_is_scored_once_however_many_answers_it_has(tokenizer):
    what, passes = served(tokenizer), []
    with running(what) as (address, _):
        what.model.get_base_model().register_forward_hook(lambda *_: passes.append(1))
        body = {"model": "tiny", "prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 0}
        once, first = post(address, "completions", body).json(), len(passes)
        many = post(address, "completions", {**body, "n": 16}).json()
    assert len(many["choices"]) == 16
    assert 0 < len(passes) - first <= first
    assert many["choices"][15]["logprobs"] == once["choices"][0]["logprobs"]


@pytest.mark.parametrize("given", ["text", "ids"])
def test_a_long_echo_is_scored_in_parts(given, tokenizer, monkeypatch):
    prompt = PROMPT if given == "text" else tokenizer(PROMPT)["input_ids"]
    body = {"model": "tiny", "echo": True, "logprobs": 2, "max_tokens": 0}
    with running(served(tokenizer)) as (address, _):
        whole = post(address, "completions", {**body, "prompt": PROMPT}).json()["choices"][0]
        monkeypatch.setattr(echo, "PART", 4)
        parts = post(address, "completions", {**body, "prompt": [prompt, prompt]}).json()["choices"][1]
    if given == "text":
        assert (parts["text"], parts["logprobs"]["text_offset"]) == (PROMPT, whole["logprobs"]["text_offset"])
    else:
        texts = [tokenizer.decode(prompt[:k]) for k in range(len(prompt) + 1)]
        assert (parts["text"], parts["logprobs"]["text_offset"]) == (texts[-1], [len(text) for text in texts[:-1]])
    found, wanted = (each["logprobs"]["token_logprobs"] for each in (parts, whole))
    assert found[0] is None
    assert found[1:] == pytest.approx(wanted[1:], abs=1e-4)


def test_the_server_answers_while_a_text_is_tokenised(tokenizer, monkeypatch):
    begun, go, call = threading.Event(), threading.Event(), type(tokenizer).__call__

    def slow(self, text, **how):
        begun.set()
        go.wait(20)
        return call(self, text, **how)

    with running(served(tokenizer)) as (address, _), ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(type(tokenizer), "__call__", slow)
        body = {"model": "tiny", "prompt": "bag", "max_tokens": 1}
        waits = pool.submit(post, address, "completions", body)
        assert begun.wait(20)
        try:
            assert httpx.get(f"{address}/health", timeout=5).json() == {"status": "ok"}
        finally:
            go.set()
        assert waits.result().status_code == 200


@pytest.fixture
def parts(monkeypatch):
    """Classification of one text a part, each taking a while; the numbers of the parts done."""
    done, predict = [], classification.predict

    def slow(*args, **how):
        time.sleep(0.05)
        done.append(len(args[2]))
        return predict(*args, **how)

    monkeypatch.setattr(classification, "predict", slow)
    monkeypatch.setattr(classification, "default_token_budget", lambda model: 1)
    return done


MANY = {"model": "tiny", "input": ["bag holds 3 red."] * 60, "choices": ["red", "blue"]}


def test_a_long_classification_lets_others_have_their_turn(tokenizer, parts):
    with running(served(tokenizer)) as (address, _), ThreadPoolExecutor(1) as pool:
        waits = pool.submit(post, address, "classify", {**MANY, "input": MANY["input"][:8]})
        while not parts:
            time.sleep(0.01)
        body = {"model": "tiny", "prompt": "bag", "max_tokens": 1}
        assert post(address, "completions", body).status_code == 200
        assert len(parts) < 8
        assert [row["index"] for row in waits.result().json()["data"]] == list(range(8))


@pytest.mark.slow
def test_a_late_classification_ends_and_so_does_one_whose_client_has_gone(tokenizer, parts):
    with running(served(tokenizer), Limits(timeout=0.4)) as (address, _):
        assert post(address, "classify", MANY).status_code == 504
        late = len(parts)
        time.sleep(0.3)
        assert len(parts) <= late + 1 < 10
    parts.clear()
    with running(served(tokenizer)) as (address, worker):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/classify", json=MANY, timeout=0.3)
        ended = Call([lambda: None])
        worker.submit(ended)
        while worker.queue:
            time.sleep(0.05)
        assert len(parts) < 30


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_when_its_client_hangs_up(stream, tokenizer):
    what, passes = served(tokenizer), []
    with running(what) as (address, _):
        body = {"model": "tiny", "messages": CHAT, "max_tokens": 1, "stream": stream}
        post(address, "chat/completions", body)

        def slow(*_):
            passes.append(1)
            time.sleep(0.02)

        what.model.get_base_model().register_forward_hook(slow)
        content = json.dumps({**body, "max_tokens": 100}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with connected(address) as client:
            client.send(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            while len(passes) < 5:
                time.sleep(0.01)
        seen = 0
        while seen < len(passes):
            seen = len(passes)
            time.sleep(0.3)
    assert len(passes) < 60


def test_a_stream_that_fails_says_so(tokenizer, monkeypatch):
    monkeypatch.setattr(TextCompletion, "piece", lambda *_: 1 / 0)
    with running(served(tokenizer)) as (address, _):
        body = {"model": "tiny", "prompt": "bag", "max_tokens": 3, "stream": True}
        found = post(address, "completions", body).text
    assert json.loads(found.removeprefix("data: "))["error"]["type"] == "server_error"


@pytest.mark.slow
def test_a_stream_ends_in_words_when_the_server_stops(tokenizer, monkeypatch):
    monkeypatch.setattr(connections, "GRACE", 1)
    go = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with running(served(tokenizer)) as (address, worker):
            worker.submit(Call([lambda: go.wait(20)]))
            body = {"model": "tiny", "prompt": "bag", "max_tokens": 3, "stream": True}
            waits = pool.submit(post, address, "completions", body)
            while not worker.queue:
                time.sleep(0.01)
            threading.Timer(2, go.set).start()
        found = waits.result()
    assert found.status_code == 200
    assert json.loads(found.text.removeprefix("data: "))["error"]["code"] == "server_stopping"


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:9", 200), ("[::1]:8000", 200), ("evil.example", 400), ("localhost.evil", 400),
     ("[::1].evil", 400), ("", 400)],
)  # fmt: skip
def test_other_names_of_the_server_are_refused(host, status, address):
    for path in ("/health", "/", "/v1/models"):
        found = httpx.get(f"{address}{path}", headers={"Host": host})
        assert found.status_code == status
        assert "access-control-allow-origin" not in found.headers


def test_the_key_is_asked_for_before_the_body_is_read(tokenizer):
    with running(served(tokenizer), Limits(api_key="secret")) as (address, _):

        def parts():
            yield b"{"
            raise OSError("the body is read")

        paths = ("/openapi.json", "/v1/models", "/v1/nothing", "/v1/completions")
        for key in ("", "secret", "Basic secret", "Bearer", "Bearer secretx", "Bearer sécret".encode("latin-1")):
            for path in paths:
                found = httpx.get(f"{address}{path}", headers={"Authorization": key})
                assert (found.status_code, found.headers["www-authenticate"]) == (401, "Bearer")
        assert httpx.post(f"{address}/v1/completions", content=b"{").status_code == 401
        right = {"Authorization": "Bearer secret"}
        description = httpx.get(f"{address}/openapi.json", headers=right).json()
        assert description["components"]["securitySchemes"] == {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
        for path in ("/", "/health"):
            assert httpx.get(f"{address}{path}").status_code == 200


@pytest.mark.slow
def test_the_description_is_kept(tmp_path):
    pytest.importorskip("schemathesis")
    script = Path(__file__).parents[2] / "benchmarks" / "soak" / "schema.py"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    how = ["--cases", "150", "--phases", "fuzzing", "--port", str(port), "--json", str(tmp_path / "rows.json")]
    done = subprocess.run([sys.executable, script, *how], capture_output=True, text=True, check=False)
    assert (tmp_path / "rows.json").exists(), done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows if not row["met"]] == [], done.stdout
    assert {row["name"]: row["value"] for row in rows}["cases that fit, accepted"] > 20


def connected(address):
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def ended(connection):
    """Return whether the server ends a connection, which may be by a reset."""
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


@pytest.mark.slow
def test_connections_are_bounded_and_idle_ones_end(tokenizer):
    with running(served(tokenizer), Limits(connections=3, patience=1)) as (address, _):
        idle = [connected(address) for _ in range(3)]
        time.sleep(0.2)
        assert httpx.get(f"{address}/health").status_code == 503
        more = [connected(address) for _ in range(8)]  # beyond twice as many they end at once
        time.sleep(0.2)
        more[-1].setblocking(False)
        assert ended(more[-1])
        assert all(ended(each) for each in [*idle, *more[:-1]])
        time.sleep(0.2)
        assert httpx.get(f"{address}/health").status_code == 200
        for each in [*idle, *more]:
            each.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sent", [b"GET /health HTTP/1.1\r\nHost: loc", b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\n"
             b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"],
)  # fmt: skip
def test_a_request_that_comes_slowly_is_not_waited_for(sent, tokenizer):
    with running(served(tokenizer), Limits(patience=1)) as (address, _), connected(address) as slow:
        began = time.monotonic()
        for at in range(len(sent)):
            slow.send(sent[at : at + 1])
        for _ in range(30):
            time.sleep(0.1)
            try:
                slow.send(b"x")
            except OSError:
                break
        assert time.monotonic() - began < 2


@pytest.mark.slow
def test_a_client_that_stops_reading_is_not_waited_for():
    ended_streams = []
    app = FastAPI()
    app.state.worker = SimpleNamespace(stop=lambda: None)

    @app.get("/{name}")
    def stream(name):
        async def parts():
            try:
                for _ in range(64):
                    yield b"x" * 2**18
                    await asyncio.sleep(0.05)
            finally:
                ended_streams.append(name)

        return StreamingResponse(parts())

    server = connections.Server(app, Limits(patience=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    with connected(address) as stalled, ThreadPoolExecutor() as pool:
        reader = pool.submit(httpx.get, f"{address}/reads")  # for longer than the server's patience
        stalled.send(b"GET /stalls HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert len(reader.result().content) == 64 * 2**18
        waited = time.monotonic() + 5
        while "stalls" not in ended_streams and time.monotonic() < waited:
            time.sleep(0.05)
        received = 0
        with suppress(ConnectionResetError):
            while part := stalled.recv(2**20):
                received += len(part)
    server.should_exit = True
    thread.join(10)
    assert sorted(ended_streams) == ["reads", "stalls"]
    assert received < 64 * 2**18


def test_the_servers_bound_on_tokens_holds_where_the_model_has_none(tokenizer):
    base = BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2))
    assert not hasattr(base.config, "max_position_embeddings")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM"))
    with running(served(tokenizer, model=model), SMALL) as (address, _):
        prompt = {"model": "tiny", "prompt": [5] * 45, "temperature": 0}
        assert post(address, "completions", {**prompt, "max_tokens": 19}).status_code == 200
        refused = post(address, "completions", {**prompt, "max_tokens": 20})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert "more than the server's 64" in refused.json()["error"]["message"]
