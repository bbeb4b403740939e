"""Build the book strictly, or show it while you write: `python .ci/book.py [--serve]`.

A link to a page or a heading that is not there fails, and so does a page without an entry in the navigation, an entry
without a page, a formula that was not set, and a page that would fetch anything from elsewhere.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*\bhref=["']?(?:https?:)?//"""
)


def entries(nav: object) -> Iterator[str]:
    """Return the pages of the navigation."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict | list):
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from entries(part)


def faults(site: Path) -> Iterator[str]:
    """Return what is wrong with the navigation and with the pages that were built."""
    named = set(entries(tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    yield from (f"docs/{page} has no entry in zensical.toml" for page in sorted(pages - named))
    yield from (f"zensical.toml names docs/{page}, which is not there" for page in sorted(named - pages))
    for path in sorted(site.rglob("*.html")):
        html = path.read_text(encoding="utf-8")
        name = path.relative_to(site)
        yield from (f"{name} fetches from elsewhere: {m[0][:200]}" for m in FETCHED.finditer(html))
        if re.search(r'class="[^"]*\blanguage-math\b|<!-- book:', html):
            yield f"{name} has a formula or a command that was left as it is"


def main() -> int:
    """Build or serve the book."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="serve it at localhost:8000, and build it anew on changes")
    command = ["serve"] if parser.parse_args().serve else ["build", "--strict", "--clean"]
    status = subprocess.run(
        [sys.executable, "-m", "zensical", *command], cwd=ROOT, env=os.environ | {"NO_COLOR": "1"}
    ).returncode  # docs.book: from here
    found = [] if status or command == ["serve"] else list(faults(ROOT / "site"))
    for fault in found:
        print(fault, file=sys.stderr)
    return status or bool(found)


if __name__ == "__main__":
    sys.exit(main())
