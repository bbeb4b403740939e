"""The book: its blocks of code run, every page has its place, every public name its entry, every method one form."""

import json
import re
import runpy
import tomllib
from pathlib import Path

import pytest
from support.book import blocks, run_notebook, run_page
from support.forked import run_alone

import bayeslora as bl

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
HEADINGS = ["Idea", "Formula", "When", "Settings", "Cost", "Measured", "Limits", "Paper"]
PAGES = [page for page in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))) if blocks(page)]
REASONS = {
    "installs packages",
    "takes minutes",
    "takes hours",
    "a GPU",
    "several processes",
    "Slurm",
    "a server",
    "vLLM",
    "the Hub",
    "published tasks",
}
MAX_NOT_RUN = 30
NOTEBOOK = ROOT / "examples" / "first_hour.ipynb"
METHODS = sorted(path for path in (DOCS / "methods").glob("*.md") if path.stem != "index")


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


def runnable():
    """Return the pages with a block that runs; one that compares all methods is slow."""
    for page in PAGES:
        if not all(block.reason for block in blocks(page)):
            slow = "--methods all" in page.read_text(encoding="utf-8")
            yield pytest.param(page, id=str(page.relative_to(ROOT)), marks=[pytest.mark.slow] if slow else [])


@pytest.mark.slow
@pytest.mark.parametrize("page", list(runnable()))
def test_the_blocks_of_a_page_run(page, tmp_path):
    status, said = run_alone(lambda: run_page(page), tmp_path)
    assert status == 0, said[-3000:]


def test_few_blocks_are_not_run_and_each_says_why():
    reasons = [block.reason for page in PAGES for block in blocks(page) if block.reason]
    assert set(reasons) <= REASONS
    assert len(reasons) <= MAX_NOT_RUN


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    status, said = run_alone(lambda: run_notebook(NOTEBOOK), tmp_path)
    assert status == 0, said[-3000:]


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.fixture(scope="module")
def pictures():
    return runpy.run_path(str(DOCS / "figures.py"))["PICTURES"]


def test_a_picture_says_what_its_text_says(pictures):
    panels = pictures["reliability"]().axes
    said = [re.findall(r"(\d+)%", text.get_text()) for ax in panels for text in ax.texts if "says" in text.get_text()]
    alternative = re.search(r"!\[Reliability(.*?)\]", (DOCS / "index.md").read_text(encoding="utf-8"))[1]
    assert [number for pair in said for number in pair] == re.findall(r"(\d+) %", alternative)


def test_every_picture_is_kept_and_shown(pictures):
    shown = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "concepts").glob("*.md"))
    assert all((DOCS / "assets" / f"{name}.svg").exists() and f"assets/{name}.svg" in shown for name in pictures)
