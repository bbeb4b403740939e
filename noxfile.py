"""The project with other releases and as a wheel, and known vulnerabilities: `nox --list` names the sessions."""

from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.options.sessions = ["lint", "types", "tests"]
PROJECT = nox.project.load_toml("pyproject.toml")["project"]
SHORT_DEMO = ["demo", "--train-rows", "60", "--test-rows", "60", "--epochs", "2", "--draws", "3", "--out", "demo"]


def lowest_of(*extras: str) -> list[str]:
    """Return the lowest release that the project declares of each of its requirements and of some extras'."""
    declared = [*PROJECT["dependencies"], *(r for extra in extras for r in PROJECT["optional-dependencies"][extra])]
    pins = {}
    for requirement in map(Requirement, declared):
        (low,) = (one.version for one in requirement.specifier if one.operator == ">=")
        pins[requirement.name] = f"{requirement.name}=={low}"
    return list(pins.values())


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


@nox.session
def lowest(session: nox.Session) -> None:
    """The tests with the lowest release that is declared of every requirement."""
    session.install("-e", ".[test]", *lowest_of("test"))
    session.run("pytest", *session.posargs)


@nox.session
def latest(session: nox.Session) -> None:
    """The tests with the newest release of everything, requirements of requirements too."""
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", ".[test]")
    session.run("pytest", *session.posargs)


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
def audit(session: nox.Session) -> None:
    """Known vulnerabilities of what the project is used with; needs the network."""
    session.install("-e", ".[demo,trl,quantised,serve,client,lm-eval]", "pip-audit")
    session.run("pip-audit", "--skip-editable", *session.posargs)
