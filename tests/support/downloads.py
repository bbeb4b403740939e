"""Shared by the tests of `cli.demo.download` share: both models, with tiny files in the place of the published ones."""

from __future__ import annotations

import importlib.util
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from bayeslora.cli.demo import model as module
from bayeslora.cli.demo.download import NEEDED, Published

WEIGHTS = b"the weights"


@dataclass(frozen=True)
class Case:
    """One of the two models, as the tests see it: its function, and the names in the module that they replace."""

    find: Callable[..., Path]
    constant: str
    maker: str

    @property
    def published(self) -> Published:
        return getattr(module, self.constant)


CASES = {
    "model": Case(module.demo_model, "SMOLLM2", "convert_package"),
    "encoder": Case(module.demo_encoder, "MINILM", "copy_package"),
}


def write_model(folder: Path, content: bytes = b"made") -> Path:
    folder.mkdir(parents=True)
    for name in NEEDED:
        (folder / name).write_bytes(WEIGHTS if name == "model.safetensors" else content)
    return folder


def forbidden(*_: object, **__: object) -> NoReturn:
    pytest.fail("this road must not be taken")


def wheel_of(published: Published) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in ("__init__.py", published.source, *published.beside):
            archive.writestr(zipfile.ZipInfo(f"{published.module}/{name}"), WEIGHTS)
    return content.getvalue()


def install(
    monkeypatch: pytest.MonkeyPatch, published: Published, folder: Path, weights: bytes, leave_out: str = ""
) -> None:
    """Put a package with the model on the path; importing it would fail."""
    package = folder / published.module
    package.mkdir(parents=True)
    for name in {published.source, *published.beside} - {leave_out}:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_bytes(weights)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    spec = importlib.util.spec_from_file_location(
        published.module, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    hidden = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == published.module else hidden(name))
