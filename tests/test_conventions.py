"""The code's conventions, held: sizes, names that tests may use, randomness, and names that the documentation gives."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC, TESTS = ROOT / "src" / "bayeslora", ROOT / "tests"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
MAX_ROOT_FILES = 8
MAX_LINES_WITH_ANY = 150


def read(path):
    return path.read_text(encoding="utf-8")


def trees(folder):
    """Return every module of a folder by its path in the repository."""
    return {str(path.relative_to(ROOT)): ast.parse(read(path)) for path in sorted(folder.rglob("*.py"))}


SOURCE = trees(SRC)


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name != "_"


def bound(node):
    """Return the name that a node gives to something, as an attribute or in a module or class."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.attr
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    return ""


def used(tree):
    """Return the names by which a test may reach into the library, each with its line."""
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value.rpartition(".")[2], node.lineno  # what monkeypatch and getattr are given


def families():
    """Return the names of the classes of posteriors."""
    names = {"Posterior"}
    classes = [
        node
        for path, tree in SOURCE.items()
        if "/posteriors/" in path
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    while more := {c.name for c in classes if names & {ast.unparse(base) for base in c.bases}} - names:
        names |= more
    return names - {"Posterior"}


def asked_for(tree):
    """Return the classes that a module asks for by `isinstance` or `match`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            yield from re.findall(r"\w+", ast.unparse(node.args[1]))
        if isinstance(node, ast.MatchClass):
            yield ast.unparse(node.cls).rpartition(".")[2]


def test_a_file_and_a_function_are_short():
    files = {path: len(read(ROOT / path).splitlines()) for path in SOURCE}
    assert {path: lines for path, lines in files.items() if lines > MAX_FILE_LINES} == {}
    spans = {f"{path}: {f.name}": f.end_lineno - f.lineno + 1 for path, tree in SOURCE.items() for f in functions(tree)}
    assert {name: lines for name, lines in spans.items() if lines > MAX_FUNCTION_LINES} == {}


def test_few_types_are_any():
    lines = [line for path in SOURCE for line in read(ROOT / path).splitlines() if re.search(r"\bAny\b", line)]
    assert len(lines) <= MAX_LINES_WITH_ANY


def test_few_files_are_at_the_root():
    assert len(list(SRC.glob("*.py"))) <= MAX_ROOT_FILES


def test_tests_are_not_typed():
    typed = {
        f"{path}: {f.name}"
        for path, tree in trees(TESTS).items()
        if "/support/" not in path  # what they share is typed like the source, and mypy checks it
        for f in functions(tree)
        if f.returns or any(node.annotation for node in ast.walk(f.args) if isinstance(node, ast.arg))
    }
    assert typed == set()


def test_tests_reach_for_nothing_private():
    private = {name for tree in SOURCE.values() for node in ast.walk(tree) if is_private(name := bound(node))}
    reached = {
        f"{path}:{line} {name}" for path, tree in trees(TESTS).items() for name, line in used(tree) if name in private
    }
    assert reached == set()


def test_no_caller_is_looked_up_on_the_stack():
    assert [path for path in SOURCE if "_getframe" in read(ROOT / path)] == []


def test_the_global_generator_is_seeded_in_one_forked_place():
    def seeds(node):
        return [n for n in ast.walk(node) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.manual_seed"]

    def forks(node):
        return isinstance(node, ast.With) and any("fork_rng" in ast.unparse(item) for item in node.items)

    assert sum(len(seeds(tree)) for tree in SOURCE.values()) <= 1
    assert all(any(forks(node) and seeds(node) for node in ast.walk(tree)) for tree in SOURCE.values() if seeds(tree))


def test_no_family_of_posteriors_is_asked_for_outside_its_room():
    every = families()
    named = {path: every & set(asked_for(tree)) for path, tree in SOURCE.items() if "/posteriors/" not in path}
    assert {path: names for path, names in named.items() if names} == {}


def dotted_names(text):
    """Return the names below `bayeslora` that a text gives, those of its imports and of `bl` too."""
    yield from (name for name in re.findall(r"\bbayeslora(?:\.[A-Za-z_]\w*)+", text) if "mplstyle" not in name)
    yield from (f"bayeslora.{name}" for name in re.findall(r"\bbl\.([A-Za-z_][\w.]*\w)", text))
    for module, names in re.findall(r"\bfrom (bayeslora[\w.]*) import ([\w, ]+)", text):
        yield from (f"{module}.{name.split()[0]}" for name in names.split(",") if name.strip())


def exists(name):
    """Return whether a dotted name is that of a module, by its present path, or of something in one."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        path = ".".join(parts[:k])
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError:
            continue
        value = module
        for part in parts[k:]:
            value = getattr(value, part, None)
        return module.__name__ == path and value is not None
    return False


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_name_in_the_documentation_is_there(path):
    assert [name for name in sorted(set(dotted_names(read(path)))) if not exists(name)] == []


@pytest.mark.parametrize("path", SOURCE)
def test_a_name_in_a_docstring_is_there(path):
    documented = [n for n in ast.walk(SOURCE[path]) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    names = {name for node in documented for name in dotted_names(ast.get_docstring(node) or "")}
    assert [name for name in sorted(names) if not exists(name)] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_in_the_documentation_is_there(path):
    text = read(path)
    links = {path.parent / link for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)}
    files = {ROOT / name for name in re.findall(r"\b(?:benchmarks|docs|examples|src|tests)/[\w/-]+\.\w+", text)}
    assert [str(file) for file in sorted(links | files) if not file.exists() and file.stem != "yours"] == []


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_what_a_script_imports_is_there(folder):
    imports = {
        f"{node.module}.{alias.name}"
        for tree in trees(ROOT / folder).values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bayeslora")
        for alias in node.names
    }
    used = {name for path in (ROOT / folder).rglob("*.py") for name in dotted_names(read(path))}
    assert [name for name in sorted(imports | used) if not exists(name)] == []
