"""What the book's Markdown has beside the generator's: formulas as MathML, and commands that put files and help in.

$σ^2$ and fences of the language math          a formula, which the reader's browser sets without a script
<!-- book:help -->                             what `bayeslora` and each `bayeslora VERB --help` print
<!-- book:file examples/quickstart.py -->      a file of the repository, as a block of code
<!-- book:notebook examples/first_hour.ipynb -->   the cells of a notebook
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(r"<!-- book:(help|file|notebook) ?(\S*) -->")


def fenced(text: str, language: str) -> list[str]:
    """Return the lines of a block of code."""
    return [f"~~~~{language}", *text.rstrip("\n").split("\n"), "~~~~", ""]


def help_lines() -> Iterator[str]:
    """Say what the command line says of itself, a section for each verb."""
    from bayeslora.cli import VERBS, main

    os.environ["COLUMNS"] = "84"
    for verb in ("", *VERBS):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            main([verb, "--help"] if verb else ["--help"])
        yield from ("", f"## bayeslora {verb}".rstrip(), "")
        yield from fenced(said.getvalue(), "text")


def notebook_lines(path: Path) -> Iterator[str]:
    """Return the cells of a notebook as Markdown, less its title, which the page has."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            yield from fenced(text, "python")
        else:
            yield from re.sub(r"\A# .*\n?", "", text).split("\n")
        yield ""


class Commands(Preprocessor):
    """Replaces the lines that are commands."""

    def run(self, lines: list[str]) -> list[str]:
        """Return the page's lines."""
        return [more for line in lines for more in self.expanded(line)]

    @staticmethod
    def expanded(line: str) -> list[str]:
        """Return what stands in the place of a line."""
        command = COMMAND.fullmatch(line.strip())
        if command is None:
            return [line]
        kind, path = command.groups()
        if kind == "help":
            return list(help_lines())
        if kind == "notebook":
            return list(notebook_lines(ROOT / path))
        return fenced((ROOT / path).read_text(encoding="utf-8"), "bash" if path.endswith(".sh") else "python")


def mathml(source: str, *, display: bool) -> str:
    """Return a formula of LaTeX as MathML."""
    return convert(source.strip(), display="block" if display else "inline")


def display_math(source: str, *_: object, **__: object) -> str:
    """Return a fenced formula as a block of MathML."""
    return f'<div class="formula">{mathml(source, display=True)}</div>'


class InlineMath(InlineProcessor):
    """Formulas within the text."""

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:  # noqa: N802
        """Return the formula's element and where it was."""
        placeholder = self.md.htmlStash.store(mathml(m[1], display=False))
        return placeholder, m.start(0), m.end(0)


class BookExtension(Extension):
    """The extension that the generator loads."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Add what is above."""
        md.preprocessors.register(Commands(md), "book-commands", 40)
        md.inlinePatterns.register(InlineMath(r"(?<![\\$\w])\$(?! )([^$\n]+?)(?<! )\$(?![\d$])", md), "book-math", 185)


def makeExtension(**settings: object) -> BookExtension:  # noqa: N802
    """Return the extension."""
    return BookExtension(**settings)
