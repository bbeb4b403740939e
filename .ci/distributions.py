"""Build sdist and wheel into a folder, and check what is in them: `python .ci/distributions.py FOLDER`.

The sdist has tracked files only, the tests among them; the wheel is the package's tracked files, and what the sdist
builds is the same. Needs `build` and `hatchling`.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from packaging.metadata import Metadata

ROOT = Path(__file__).parents[1]
NEEDED = ("src/bayeslora/py.typed", "tests/conftest.py", "tests/support/tiny.py", "LICENSE", "NOTICE", "README.md")


def build(source: Path, out: Path, kind: str) -> None:
    """Build ``sdist`` or ``wheel`` of a folder with the build backend that is installed."""
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def contents(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def tracked_files() -> set[str]:
    """Return the files that git tracks, or outside of a clone all that are there."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=False, capture_output=True, text=True)
    if listed.returncode == 0:
        return set(listed.stdout.splitlines())
    return {p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def check(out: Path) -> None:
    """Build both, and raise AssertionError where one is not as it should be."""
    build(ROOT, out, "sdist")
    build(ROOT, out, "wheel")
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    tracked = tracked_files()

    with tempfile.TemporaryDirectory() as scratch:
        shutil.unpack_archive(sdist, scratch)
        (unpacked,) = Path(scratch).iterdir()
        files = {str(p.relative_to(unpacked).as_posix()) for p in unpacked.rglob("*") if p.is_file()}
        assert files - tracked == {"PKG-INFO"}, f"not tracked, but in the sdist: {files - tracked - {'PKG-INFO'}}"
        left_out = {name for name in tracked if name.startswith(("src/", "tests/"))} - files
        assert not left_out, f"not in the sdist: {left_out}"
        assert set(NEEDED) <= files, f"not in the sdist: {set(NEEDED) - files}"
        build(unpacked, Path(scratch), "wheel")
        (again,) = Path(scratch).glob("*.whl")
        assert contents(again) == contents(wheel), "the sdist builds another wheel than the checkout"

    package = {name.removeprefix("src/") for name in tracked if name.startswith("src/")}
    inside = contents(wheel)
    info = {name for name in inside if PurePosixPath(name).parts[0].endswith(".dist-info")}
    assert inside.keys() - info == package, f"the wheel differs from src: {(inside.keys() - info) ^ package}"
    (metadata,) = (inside[name] for name in info if name.endswith(".dist-info/METADATA"))
    Metadata.from_email(metadata, validate=True)
    print(f"{sdist.name}: {len(files)} files; {wheel.name}: {len(package)} files; metadata valid")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where sdist and wheel go; a new folder")
    check(parser.parse_args().folder)
