"""Posteriors to the Hub and back: with a Hub of folders, and with a server that refuses."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from peft import PeftModel
from support.tiny import gaussian, make_base, make_model, same_params

from bayeslora.errors import InputError
from bayeslora.params import read
from bayeslora.posteriors import Mixture, Point
from bayeslora.posteriors.card import write_card
from bayeslora.posteriors.hub import fetch, push
from bayeslora.posteriors.loading import load_adapter, load_posterior
from bayeslora.posteriors.provenance import origin_of


@dataclass
class FakeHub:
    """Repositories as folders: ``main`` and each commit by its number."""

    root: Path
    private: dict[str, bool | None] = field(default_factory=dict)
    tokens: set[Any] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)

    def files(self, repo_id):
        main = self.root / repo_id / "main"
        return {str(path.relative_to(main)): path.read_bytes() for path in main.rglob("*") if path.is_file()}

    def create_repo(self, api, repo_id, *, private=None, exist_ok=False):
        validate_repo_id(repo_id)
        full = repo_id if "/" in repo_id else f"me/{repo_id}"
        assert exist_ok or not (self.root / full).exists()
        (self.root / full / "main").mkdir(parents=True, exist_ok=True)
        self.private.setdefault(full, private)
        self.tokens.add(api.token)
        return RepoUrl(f"https://huggingface.co/{full}")

    def upload_folder(self, api, *, repo_id, folder_path, commit_message, delete_patterns):
        main = self.root / repo_id / "main"
        for name in filter_repo_objects(self.files(repo_id), allow_patterns=delete_patterns):
            (main / name).unlink()
        shutil.copytree(folder_path, main, dirs_exist_ok=True)
        self.messages.append(commit_message)
        self.tokens.add(api.token)
        shutil.copytree(main, self.root / repo_id / f"commit-{len(self.messages)}")

    def snapshot_download(self, repo_id, *, revision=None, token=None):
        validate_repo_id(repo_id)
        folder = self.root / repo_id / (revision or "main")
        self.tokens.add(token)
        if not folder.exists():
            raise FileNotFoundError(f"404 for {repo_id}")
        return str(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: fake.create_repo(*args, **kwargs))
    monkeypatch.setattr(HfApi, "upload_folder", lambda *args, **kwargs: fake.upload_folder(*args, **kwargs))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_pushed_posterior_comes_back_bit_for_bit(hub, tmp_path):
    posterior = gaussian(make_model())
    posterior.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="org/mine")
    assert hub.files("org/mine") == contents(tmp_path / "out")
    back = load_posterior("org/mine", make_model())
    assert same_params(back.mean, posterior.mean)
    assert same_params(back.variance, posterior.variance)
    assert same_params(back.draw(3, 1), posterior.draw(3, 1))
    assert vars(back.origin) == vars(load_posterior(tmp_path / "out").origin)
    assert same_params(load_adapter("org/mine").mean, posterior.mean)


def test_a_mixture_comes_back_with_its_members(hub, tmp_path):
    model = make_model()
    mixture = Mixture((gaussian(model), Point(read(model), origin_of(model))), origin_of(model, "ensemble"))
    mixture.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="org/mixture")
    back = load_posterior("org/mixture")
    assert all(same_params(back.draw(k), mixture.draw(k)) for k in range(4))


def test_the_pushed_folder_is_a_plain_peft_adapter(hub, tmp_path):
    posterior = gaussian(make_model())
    posterior.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="org/mine")
    plain = PeftModel.from_pretrained(make_base("llama"), fetch("org/mine"))
    assert same_params(read(plain), posterior.mean)


def test_the_repository_has_the_folders_name_unless_one_is_given(hub, tmp_path):
    gaussian(make_model()).save_pretrained(tmp_path / "bags-swag", push_to_hub=True)
    assert 'name = "me/bags-swag"' in hub.files("me/bags-swag")["README.md"].decode()
    assert 'name = "me/bags-swag"' in (tmp_path / "bags-swag" / "README.md").read_text()


def test_private_token_and_message_are_handed_on(hub, tmp_path):
    options = {"private": True, "token": "hf_mine", "commit_message": "First"}
    gaussian(make_model()).save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="org/mine", **options)
    load_posterior("org/mine", token="hf_mine")
    assert hub.private == {"org/mine": True}
    assert hub.tokens == {"hf_mine"}
    assert hub.messages == ["First"]
    push(tmp_path / "out", "org/other")
    assert hub.private["org/other"] is None
    assert hub.messages[1] == "Upload a posterior of bayeslora"


def test_an_earlier_revision_stays_what_it_was(hub, tmp_path):
    first = gaussian(make_model())
    second = Point({name: 2 * p for name, p in first.mean.items()}, first.origin)
    for posterior in (first, second):
        posterior.save_pretrained(tmp_path / "out", overwrite=True, push_to_hub=True, repo_id="org/mine")
    assert same_params(load_posterior("org/mine", revision="commit-1").draw(1), first.draw(1))
    assert same_params(load_posterior("org/mine").mean, second.mean)


def test_nothing_of_an_earlier_posterior_is_left_in_the_repository(hub, tmp_path):
    model = make_model()
    mixture = Mixture((gaussian(model), gaussian(model)), origin_of(model, "ensemble"))
    point = Point(read(model), origin_of(model))
    (hub.root / "org/mine/main").mkdir(parents=True)
    (hub.root / "org/mine/main/figure.png").write_bytes(b"mine")
    for posterior in (mixture, gaussian(model), point):
        posterior.save_pretrained(tmp_path / "out", overwrite=True, push_to_hub=True, repo_id="org/mine")
    assert hub.files("org/mine").keys() == {
        "adapter_config.json", "adapter_model.safetensors", "posterior_config.json", "README.md", "figure.png"
    }  # fmt: skip
    assert type(load_posterior("org/mine")) is Point


def test_a_folder_of_a_run_is_pushed_with_its_card(hub, tmp_path):
    gaussian(make_model()).save_pretrained(tmp_path / "run" / "posterior")
    assert push(tmp_path / "run" / "posterior", "org/run") == "org/run"
    text = hub.files("org/run")["README.md"].decode()
    assert 'name = "org/run"' in text
    write_card(tmp_path / "run" / "posterior")
    assert text == (tmp_path / "run" / "posterior" / "README.md").read_text().replace('"posterior"', '"org/run"')


def test_what_is_no_posterior_is_not_pushed(hub, tmp_path):
    (tmp_path / "private.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a posterior of bayeslora"):
        push(tmp_path, "org/mine")
    assert not hub.root.exists()


def refused_push(folder, repo_id="org/mine"):
    """Save with a push that fails, and return the sentence; the folder is whole."""
    posterior = gaussian(make_model())
    with pytest.raises(InputError) as caught:
        posterior.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, token="hf_x")
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(f"{folder} is complete, but it was not pushed to {repo_id}: ")
    assert same_params(load_posterior(folder).draw(2), posterior.draw(2))
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}")] == []
    return said.split(": ", 1)[1]


@pytest.mark.parametrize("name", ["a/b/c", "-org/mine", "org/with space", ""])
def test_a_name_that_no_repository_can_have_is_refused_when_the_folder_is_there(name, hub, tmp_path):
    assert "write it as org/name" in refused_push(tmp_path / "out", name)


def test_a_push_that_breaks_off_can_be_made_again(hub, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:

        def breaks(*_, **__):
            raise ConnectionError("reset by peer")

        patch.setattr(HfApi, "upload_folder", breaks)
        assert refused_push(tmp_path / "out") == "the Hub could not be reached; check the network and try again"
    assert hub.files("org/mine") == {}
    push(tmp_path / "out", "org/mine")
    assert hub.files("org/mine") == contents(tmp_path / "out")


def test_what_nobody_thought_of_is_said_in_its_first_line(hub, tmp_path, monkeypatch):
    def breaks(*_, **__):
        raise RuntimeError("the store is full.\nTraceback of another language")

    monkeypatch.setattr(HfApi, "upload_folder", breaks)
    assert refused_push(tmp_path / "out") == "the store is full; try again"


@pytest.fixture
def server(monkeypatch):
    """A Hub that answers every request with one status, to the real client."""
    answer = {"status": 500, "headers": {}}

    class Refuses(BaseHTTPRequestHandler):
        def answers(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(answer["status"])
            for key, value in answer["headers"].items():
                self.send_header(key, value)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}" if self.command != "HEAD" else b"")

        do_GET = do_POST = do_HEAD = answers  # noqa: N815

        def log_message(self, *_):
            pass

    own = HTTPServer(("127.0.0.1", 0), Refuses)
    thread = threading.Thread(target=own.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    place = f"http://127.0.0.1:{own.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", place)

    def set_answer(status, code=""):
        answer["status"], answer["headers"] = status, {"X-Error-Code": code} if code else {}

    yield set_answer
    own.shutdown()
    own.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "", "the Hub does not know who you are; log in with `hf auth login`, or pass token=..."),
        (403, "", "the token may not write there; pass one that may, or choose another repository"),
        (404, "RepoNotFound", "there is none of that name, or it is private"),
    ],
)
def test_a_hub_that_refuses_a_push_is_put_in_words(status, code, said, server, tmp_path):
    server(status, code)
    assert said in refused_push(tmp_path / "out")


@pytest.mark.parametrize(
    ("status", "code", "revision", "said"),
    [
        (404, "RepoNotFound", None, "there is none of that name, or it is private"),
        (401, "", None, "there is none of that name, or it is private"),
        (404, "RevisionNotFound", "v9", "org/mine at v9 is neither a folder .* no such revision"),
        (403, "", None, "the token may not read it"),
        (500, "", None, "500 Internal Server Error"),
    ],
)
def test_a_hub_that_refuses_to_give_is_put_in_words(status, code, revision, said, server):
    server(status, code)
    with pytest.raises(InputError, match=said) as caught:
        load_posterior("org/mine", revision=revision)
    assert "\n" not in str(caught.value)


def test_without_a_network_it_is_said_and_the_folder_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the Hub could not be reached" in refused_push(tmp_path / "out")
    with pytest.raises(InputError, match=r"neither a folder nor a repository .* could not be reached"):
        load_posterior("org/mine")
