"""The book: every page has its place, every public name its entry, every method's page the same headings."""

import re
import tomllib
from pathlib import Path

import pytest

import bayeslora as bl

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
HEADINGS = ["Idea", "Formula", "When", "Settings", "Cost", "Measured", "Limits", "Paper"]
METHODS = sorted(path for path in (DOCS / "methods").glob("*.md") if path.stem not in ("index", "divergence"))


def entries(nav):
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in entries(part)]


def test_every_page_has_one_entry_in_the_navigation():
    nav = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    assert sorted(entries(nav)) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_every_public_name_is_in_the_reference_once():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    assert sorted(re.findall(r"^::: bayeslora\.(\w+)$", text, re.MULTILINE)) == sorted({*bl.__all__} - {"__version__"})


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_methods_page_has_the_headings_of_the_others(path):
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS
    assert f"<!-- study:begin {path.stem} -->" in text
