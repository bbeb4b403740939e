"""Worlds without the Hub, without pip, and with a pip that has one wheel."""

import hashlib
import importlib.util
import subprocess
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from support.downloads import CASES, WEIGHTS, forbidden, wheel_of, write_model

from bayeslora.cli.demo import model as module


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    """A model with the hashes of tiny files; the conversion is replaced by files that hold the source's content."""
    case, sha256 = CASES[request.param], hashlib.sha256(WEIGHTS).hexdigest()
    real = case.published
    tiny = replace(
        real,
        weights_sha256=real.weights_sha256 and sha256,
        source_sha256=sha256,
        wheel_sha256=hashlib.sha256(wheel_of(real)).hexdigest(),
    )
    monkeypatch.setattr(module, case.constant, tiny)
    monkeypatch.setattr(
        module, "convert_package", lambda package, folder: write_model(folder, (package / tiny.source).read_bytes())
    )
    specs = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == tiny.module else specs(name))
    return case


@pytest.fixture
def no_hub(monkeypatch):
    def nothing_kept(*_, **options):
        assert options.pop("local_files_only", False)
        raise LocalEntryNotFoundError("nothing kept")

    def unreachable(*_, **__):
        raise HTTPError("name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing_kept)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)


@pytest.fixture
def no_pip(monkeypatch):
    monkeypatch.setattr(subprocess, "run", forbidden)


@pytest.fixture
def pip(case, monkeypatch):
    """Replace pip by a copy from a shelf of one wheel; return the commands that were run."""
    commands = []

    def run(command, **_):
        commands.append(command)
        (Path(command[-1]) / f"{case.published.module}-0.1-py3-none-any.whl").write_bytes(wheel_of(case.published))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands
